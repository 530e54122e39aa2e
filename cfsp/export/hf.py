"""The canonical form again, in another dtype or place: compact tensors, with the family's modelling file if needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cfsp.export.filling import Wanted, layer_tensors, other_tensors, sizes
from cfsp.export.folder import ModelFolder, check_there
from cfsp.export.plain_folder import write_plain_folder
from cfsp.export.result import Exported
from cfsp.plan.history import history_of
from cfsp.plan.pruning_plan import COMPENSATION_IN_FOLDER
from cfsp.pruned_model.family import PRUNED_PREFIX, pruned_family

#: The plan and the tensors that it needs.
_PLAN = ("plan.json", COMPENSATION_IN_FOLDER)


def check(source: ModelFolder) -> None:
    """Every whole folder that is read has this form.

    Raises:
        CheckpointError: the folder is not whole.
    """
    check_there(source)


def export(source: ModelFolder, to: Path, *, dtype: torch.dtype | None = None, multiple: int = 1) -> Exported:
    """Write the folder ``to``, all or nothing; ``multiple`` is of other forms, nothing is filled up here.

    Raises:
        CheckpointError: the folder is not whole, or ``to`` cannot be written.
    """
    check(source)
    tensors = [*other_tensors(source)]
    for index, layer in enumerate(source.layers):
        wanted = Wanted(layer.width, layer.heads, layer.kv_heads, frozenset(layer.added_bias))
        tensors += layer_tensors(source, index, wanted)
    pruned = not _is_plain(source)
    files = {name: text.encode() for name, text in pruned_family(source.family).files.items()} if pruned else {}
    same = dtype in (None, source.dtype)  # else replaying the plan would not give these weights
    if same and history_of(source.folder, tensors=False) is not None:
        files |= {name: (source.folder / name).read_bytes() for name in _PLAN if (source.folder / name).is_file()}
    form = "remote_code" if pruned else "plain"
    config = source.source.config if pruned else _plain_config(source)
    size = write_plain_folder(source, to, config, tensors, dtype=dtype, form=form, files=files)
    notes = () if pruned else (f"all layers are alike: a plain {source.family} folder, which needs no remote code",)
    return Exported(to, "hf", size, notes)


def _is_plain(source: ModelFolder) -> bool:
    """Whether the stock class describes the layers: they are alike, in heads that its configuration takes."""
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
