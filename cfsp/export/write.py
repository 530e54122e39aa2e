"""Entry point of exports: write a model folder in the format that another tool loads."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.errors import CfspError, CheckpointError
from cfsp.plan.check import BlockSizes
from cfsp.plan.history import check_history

if TYPE_CHECKING:
    from cfsp.export.folder import ModelFolder
    from cfsp.export.result import Exported

log = logging.getLogger(__name__)


#: Format -> its module, which has ``check(source)`` and ``export(source, to, dtype=, multiple=)``.
FORMATS = {
    "hf": "cfsp.export.hf",
    "padded": "cfsp.export.padded",
    "gguf": "cfsp.export.gguf",
    "decilm": "cfsp.export.decilm",
}


#: Dtype as the user may write it -> torch's name. GGUF also takes q8_0.
DTYPES = {
    "float32": "float32", "f32": "float32", "float16": "float16", "f16": "float16", "bfloat16": "bfloat16",
    "bf16": "bfloat16",
}  # fmt: skip


_GGUF_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


#: Share of the free memory above which a model is read block by block.
_SHARE_OF_MEMORY = 0.6


@dataclass(frozen=True)
class Request:
    """Checked request for an export.

    Attributes:
        path: model folder, or the OUT of a run.
        format: key of :data:`FORMATS`.
        to: folder or file to write; None: beside the model folder.
        dtype: torch's name of a dtype, or q8_0; None: as stored.
        multiple: multiple to which FFN widths are filled up; None: the format's own.
    """

    path: Path
    format: str
    to: Path | None = None
    dtype: str | None = None
    multiple: int | None = None


def place_beside(folder: Path, format: str) -> Path:
    """Return the place of an export where the user gives none: beside the model folder."""
    return folder.with_name(folder.name + (".gguf" if format == "gguf" else f"-{format}"))


def check_place(to: Path, format: str) -> None:
    """Check that an export in this format may be written to ``to``.

    Raises:
        CheckpointError: something is there that cfsp did not write.
    """
    if format == "gguf":
        # Start-up time: loads numpy, safetensors, torch.
        from cfsp.export.gguf import check_file

        check_file(to)
    else:
        from cfsp.checkpoint.save import check_destination

        check_destination(to)


def write_export(request: Request) -> Exported:
    """Write a model folder in another format.

    Args:
        request: the folder, the format, the place and the dtype.

    Returns:
        The place, format and size of the export, with notes for the user.

    Raises:
        CfspError: the folder cannot be read, the format cannot hold the model, or the result cannot be written.
    """
    import torch

    # Start-up time: loads numpy, safetensors, torch.
    from cfsp.checkpoint.reference import place_of
    from cfsp.export.folder import read_folder

    source = read_folder(request.path)
    module = importlib.import_module(FORMATS[request.format])
    to = request.to or place_beside(source.folder, request.format)
    source_place, target_place = source.folder.resolve(), to.resolve()
    if source_place == target_place:
        raise CheckpointError(f"to={to}: is the folder to be exported; give another place")
    if source_place in target_place.parents or target_place in source_place.parents:
        # Writing to one of the two replaces the whole folder, and with it the other.
        relation = "within" if source_place in target_place.parents else "around"
        raise CheckpointError(
            f"to={to}: lies {relation} the folder to be exported, {source.folder}; give another place"
        )
    check_history(source.folder, [BlockSizes(layer.width, layer.kv_heads) for layer in source.layers])
    settings: dict[str, Any] = {} if request.multiple is None else {"multiple": request.multiple}
    if request.format == "gguf":
        dtype: Any = _GGUF_DTYPES.get(str(request.dtype), request.dtype) or "auto"
    else:
        dtype = None if request.dtype is None else getattr(torch, request.dtype)
    result: Exported = module.export(source, to, dtype=dtype, **settings)
    if not place_of(result.place).is_file() and source.dense:
        _write_reference(source, result.place)
    return result


def _write_reference(source: ModelFolder, export: Path) -> None:
    """Compute the reference of a dense folder and write it beside the export.

    No run has written the reference of such a folder, so there would be nothing to compare the export with.
    """
    import torch

    # Start-up time: loads numpy, safetensors, torch.
    from cfsp.checkpoint.reference import place_of
    from cfsp.checkpoint.reference_pass import reference_of
    from cfsp.model.load import load_model, load_streamed
    from cfsp.system.memory import available
    from cfsp.weights.shards import weight_files

    cpu = torch.device("cpu")
    fits = sum(file.stat().st_size for file in weight_files(source.folder)) < _SHARE_OF_MEMORY * available(cpu)
    try:
        model = (load_model if fits else load_streamed)(source.source, dtype=source.dtype, device=cpu)
        reference_of(model, dtype=source.dtype, tokenizer=source.folder).write(place_of(export))
    except (CfspError, OSError) as error:  # the export is whole without it
        log.warning("%s: has no reference for cfsp verify (%s)", export, error)
