"""Export to cfsp's own format again, in another dtype or place: compact tensors, with modelling code where needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cfsp.export.filling import TargetSizes, layer_tensors, other_tensors, sizes
from cfsp.export.folder import ModelFolder, check_tensors_stored
from cfsp.export.plain_folder import write_plain_folder
from cfsp.export.result import Exported
from cfsp.plan.history import read_plan_history
from cfsp.plan.pruning_plan import COMPENSATION_IN_FOLDER
from cfsp.pruned_model.family import PRUNED_PREFIX, pruned_family

#: Files of the plan: the plan itself and the tensors that it needs.
_PLAN = ("plan.json", COMPENSATION_IN_FOLDER)


def check(source: ModelFolder) -> None:
    """Check that the folder is whole; every such folder has this format.

    Raises:
        CheckpointError: the folder is not whole.
    """
    check_tensors_stored(source)


def export(source: ModelFolder, to: Path, *, dtype: torch.dtype | None = None, multiple: int = 1) -> Exported:
    """Write the model to the folder ``to``, all or nothing.

    Args:
        source: the model folder.
        to: folder to write; one that cfsp wrote earlier is replaced.
        dtype: dtype of the tensors; None: as they are stored.
        multiple: ignored, because nothing is filled up in this format.

    Raises:
        CheckpointError: the folder is not whole, or ``to`` cannot be written.
    """
    check(source)
    tensors = [*other_tensors(source)]
    for index, layer in enumerate(source.layers):
        target = TargetSizes(layer.width, layer.heads, layer.kv_heads, frozenset(layer.added_bias))
        tensors += layer_tensors(source, index, target)
    pruned = not _is_plain(source)
    files = {name: text.encode() for name, text in pruned_family(source.family).files.items()} if pruned else {}
    unchanged_dtype = dtype in (None, source.dtype)  # in another dtype, replaying the plan would not give these weights
    if unchanged_dtype and read_plan_history(source.folder, tensors=False) is not None:
        files |= {name: (source.folder / name).read_bytes() for name in _PLAN if (source.folder / name).is_file()}
    format = "remote_code" if pruned else "plain"
    config = source.source.config if pruned else _plain_config(source)
    size = write_plain_folder(source, to, config, tensors, dtype=dtype, format=format, files=files)
    notes = () if pruned else (f"all layers are alike: a plain {source.family} folder, which needs no remote code",)
    return Exported(to, "hf", size, notes)


def _is_plain(source: ModelFolder) -> bool:
    """Return whether the stock class describes the layers: equal sizes, with head counts that it takes."""
    if not source.uniform:
        return False
    heads = source.layers[0].heads
    return heads == source.config["num_attention_heads"] or source.hidden % heads == 0


def _plain_config(source: ModelFolder) -> dict[str, Any]:
    if not str(source.source.config.get("model_type", "")).startswith(PRUNED_PREFIX):
        return source.source.config
    width, heads, kv_heads = sizes(source.layers)
    return {
        **source.config,
        "intermediate_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": source.head_dim,
    }
