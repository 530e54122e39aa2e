"""``cfsp export path=DIR format=...``: a model folder in the form that another tool loads."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.components import suggest
from cfsp.errors import CfspError, CheckpointError, ConfigError
from cfsp.sweep.command import command
from cfsp.words import plain_values

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
_KEYS = ("path", "format", "to", "dtype", "multiple")

USAGE = f"""\
Write a model folder, pruned or dense, in the form that another tool loads.

  cfsp export path=OUT/model format=padded       the base architecture, filled up with zeros: loads everywhere, no
                                                 remote code, gives back a part of the speed
  cfsp export path=OUT/model format=gguf         llama.cpp: a file; dtype=f32, f16, bf16 or q8_0
  cfsp export path=OUT/model format=decilm       vLLM's own class; widths filled up to multiples of 256
  cfsp export path=OUT/model format=hf dtype=bf16   the folder as a run writes it, in another dtype

  to=PLACE       where to; default: beside the folder, NAME-FORMAT or NAME.gguf
  dtype=         float32, float16, bfloat16 (f32, f16, bf16); default: that of the folder
  multiple=N     fill up FFN widths to multiples of N with zero neurons (padded: 1, gguf: 32, decilm: 256)

Formats: {", ".join(FORMATS)}. Exit codes: 0 written, 1 failed on the way, 2 wrong input, or a model that the format
cannot hold.
"""


@dataclass(frozen=True)
class Request:
    """A checked command line; ``dtype`` is torch's name or q8_0, None: as stored; ``multiple`` None: the format's."""

    path: Path
    format: str
    to: Path | None = None
    dtype: str | None = None
    multiple: int | None = None


def main(words: Sequence[str] | None = None) -> int:
    """Export; returns the exit code."""
    return command("cfsp", USAGE, words, lambda given: _export(request_of(given)))


def request_of(words: Sequence[str]) -> Request:
    """Read the command line.

    Raises:
        ConfigError: everything that is wrong with its keys and values.
    """
    given, problems = plain_values(words, _KEYS, "export")
    form = given.get("format", "")
    if "format" in given and form not in FORMATS:
        problems.append(
            f"format={form}: there is no such format{suggest(form, FORMATS)}; formats: {', '.join(FORMATS)}"
        )
    dtype = given.get("dtype")
    if dtype is not None and dtype not in DTYPES and (dtype != "q8_0" or form != "gguf"):
        of_gguf = " (q8_0 is one of format=gguf)" if dtype == "q8_0" else ""
        problems.append(f"dtype={dtype}: use float32, float16 or bfloat16{of_gguf}")
    multiple = given.get("multiple")
    # isdigit alone is true of "²" too
    if multiple is not None and (not (multiple.isascii() and multiple.isdigit()) or int(multiple) < 1):
        problems.append(f"multiple={multiple}: give a whole number from 1")
    elif multiple is not None and form == "decilm" and int(multiple) % 256:
        problems.append(f"multiple={multiple}: format=decilm needs a multiple of 256; leave it out")
    elif multiple is not None and form == "gguf" and int(multiple) % 32:
        problems.append(
            f"multiple={multiple}: format=gguf needs a multiple of 32; leave it out, or use 256 for K-quants"
        )
    elif multiple is not None and form == "hf":
        problems.append("multiple: format=hf fills nothing up; use format=padded, or leave it out")
    if form == "gguf" and "to" in given and not given["to"].endswith(".gguf"):
        problems.append(f"to={given['to']}: a GGUF file is named *.gguf; use to={given['to'].rstrip('/')}.gguf")
    for key in ("path", "format"):
        if key not in given and not problems:
            problems.append(f"{key} is not set: give path=DIR format=FORMAT; see cfsp export --help")
    if problems:
        raise ConfigError(*problems)
    return Request(
        Path(given["path"]).expanduser(),
        form,
        Path(given["to"]).expanduser() if "to" in given else None,
        None if dtype is None else DTYPES.get(dtype, dtype),
        None if multiple is None else int(multiple),
    )


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
        from cfsp.models.checkpoint import check_destination

        check_destination(to)


def exported(request: Request) -> Any:
    """Write what is asked for; returns :class:`cfsp.export.result.Exported`.

    Raises:
        CfspError: the folder cannot be read, the format cannot hold the model, or the result cannot be written.
    """
    import torch

    from cfsp.export.folder import read_folder
    from cfsp.pruning.plan_check import BlockSizes
    from cfsp.pruning.plan_history import check_history
    from cfsp.verify.reference import place_of

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

    from cfsp.memory import available
    from cfsp.models.load import load_model
    from cfsp.models.shards import weight_files
    from cfsp.models.streamed import load_streamed
    from cfsp.verify.reference import place_of, reference_of

    cpu = torch.device("cpu")
    fits = sum(file.stat().st_size for file in weight_files(source.folder)) < _SHARE_OF_MEMORY * available(cpu)
    try:
        model = (load_model if fits else load_streamed)(source.source, dtype=source.dtype, device=cpu)
        reference_of(model, dtype=source.dtype, tokenizer=source.folder).write(place_of(export))
    except (CfspError, OSError) as error:  # the export is whole without it
        log.warning("%s: has no reference for cfsp verify (%s)", export, error)


def _export(request: Request) -> int:
    result = exported(request)
    print(f"{result.place}: {result.bytes / 2**20:,.1f} MiB, {result.form}")
    for note in result.notes:
        print(f"  {note}")
    return 0
