"""The canonical form again, in another dtype or place: compact tensors, with the family's modelling file if needed."""

from __future__ import annotations

from pathlib import Path

import torch

from cfsp.export.filling import Wanted, layer_tensors, other_tensors
from cfsp.export.folder import ModelFolder
from cfsp.export.plain_folder import write_plain_folder
from cfsp.export.result import Exported
from cfsp.models.remote_code import PRUNED_PREFIX, pruned_family


def check(source: ModelFolder) -> None:
    """Every folder that is read has this form."""


def export(source: ModelFolder, to: Path, *, dtype: torch.dtype | None = None, multiple: int = 1) -> Exported:
    """Write the folder ``to``, all or nothing; ``multiple`` is of other forms, nothing is filled up here.

    Raises:
        CheckpointError: it cannot be written.
    """
    tensors = [*other_tensors(source)]
    for index, layer in enumerate(source.layers):
        wanted = Wanted(layer.width, layer.heads, layer.kv_heads, frozenset(layer.added_bias))
        tensors += layer_tensors(source, index, wanted)
    pruned = str(source.source.config.get("model_type", "")).startswith(PRUNED_PREFIX)
    files = dict(pruned_family(source.family).files) if pruned else {}
    kept = {
        name: (source.folder / name).read_text(encoding="utf-8") for name in _KEPT if (source.folder / name).is_file()
    }
    form = "remote_code" if pruned else "plain"
    size = write_plain_folder(
        source, to, source.source.config, tensors, dtype=dtype, form=form, files={**files, **kept}
    )
    notes = () if pruned else (f"all layers are alike: a plain {source.family} folder, which needs no remote code",)
    return Exported(to, "hf", size, notes)


_KEPT = ("plan.json",)
