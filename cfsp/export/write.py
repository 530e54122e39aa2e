"""Writing a model folder in the format that another tool loads."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.errors import CfspError, CheckpointError

if TYPE_CHECKING:
    from cfsp.export.folder import ModelFolder


log = logging.getLogger(__name__)


#: Format -> its module, which has ``check(source)`` and ``export(source, to, dtype=, multiple=)``.
FORMATS = {
    "hf": "cfsp.export.hf",
    "padded": "cfsp.export.padded",
    "gguf": "cfsp.export.gguf",
    "decilm": "cfsp.export.decilm",
}


#: As it is given -> torch's name; of GGUF alone: q8_0.
DTYPES = {
    "float32": "float32", "f32": "float32", "float16": "float16", "f16": "float16", "bfloat16": "bfloat16",
    "bf16": "bfloat16",
}  # fmt: skip


_OF_GGUF = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


#: A model that takes more of the free memory is read block by block.
_SHARE_OF_MEMORY = 0.6


@dataclass(frozen=True)
class Request:
    """A checked command line; ``dtype`` is torch's name or q8_0, None: as stored; ``multiple`` None: the format's."""

    path: Path
    format: str
    to: Path | None = None
    dtype: str | None = None
    multiple: int | None = None


def place_beside(folder: Path, form: str) -> Path:
    """Where the export of a model folder is written if nobody says where."""
    return folder.with_name(folder.name + (".gguf" if form == "gguf" else f"-{form}"))


def check_place(to: Path, form: str) -> None:
    """See that an export of this format may be written to ``to``.

    Raises:
        CheckpointError: there is something that cfsp did not write.
    """
    if form == "gguf":
        from cfsp.export.gguf import check_file

        check_file(to)
    else:
        from cfsp.checkpoint.save import check_destination

        check_destination(to)


def exported(request: Request) -> Any:
    """Write what is asked for; returns :class:`cfsp.export.result.Exported`.

    Raises:
        CfspError: the folder cannot be read, the format cannot hold the model, or the result cannot be written.
    """
    import torch

    from cfsp.checkpoint.reference import place_of
    from cfsp.export.folder import read_folder
    from cfsp.plan.check import BlockSizes
    from cfsp.plan.history import check_history

    source = read_folder(request.path)
    module = importlib.import_module(FORMATS[request.format])
    to = request.to or place_beside(source.folder, request.format)
    here, there = source.folder.resolve(), to.resolve()
    if here == there:
        raise CheckpointError(f"to={to}: is the folder to be exported; give another place")
    if here in there.parents or there in here.parents:  # the second would be replaced with the model in it
        relation = "within" if here in there.parents else "around"
        raise CheckpointError(
            f"to={to}: lies {relation} the folder to be exported, {source.folder}; give another place"
        )
    check_history(source.folder, [BlockSizes(layer.width, layer.kv_heads) for layer in source.layers])
    more: dict[str, Any] = {} if request.multiple is None else {"multiple": request.multiple}
    if request.format == "gguf":
        dtype: Any = _OF_GGUF.get(str(request.dtype), request.dtype) or "auto"
    else:
        dtype = None if request.dtype is None else getattr(torch, request.dtype)
    result = module.export(source, to, dtype=dtype, **more)
    if not place_of(result.place).is_file() and source.dense:
        _write_reference(source, result.place)
    return result


def _write_reference(source: ModelFolder, export: Path) -> None:
    """No run has written what a dense folder computes, so its export would have nothing to be compared with."""
    import torch

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
