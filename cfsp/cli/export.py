"""``cfsp export path=DIR format=...``: write a model folder in the format that another tool loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cfsp.config.components import suggest
from cfsp.config.overrides import plain_values
from cfsp.errors import ConfigError
from cfsp.export.write import DTYPES, FORMATS, Request, write_export
from cfsp.system.command import command

_KEYS = ("path", "format", "to", "dtype", "multiple")

USAGE = f"""\
Write a model folder, pruned or dense, in the format that another tool loads.

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


def main(overrides: Sequence[str] | None = None) -> int:
    """Export a model and return the exit code."""
    return command("cfsp", USAGE, overrides, lambda arguments: _export(read_request(arguments)), verb="export")


def read_request(overrides: Sequence[str]) -> Request:
    """Check the command line and return the request.

    Raises:
        ConfigError: a key or value is wrong; the message has all problems.
    """
    values, problems = plain_values(overrides, _KEYS, "export")
    format_name = values.get("format", "")
    if "format" in values and format_name not in FORMATS:
        problems.append(
            f"format={format_name}: there is no such format{suggest(format_name, FORMATS)}; formats: "
            f"{', '.join(FORMATS)}"
        )
    dtype = values.get("dtype")
    if dtype is not None and dtype not in DTYPES and (dtype != "q8_0" or format_name != "gguf"):
        remark = " (q8_0 is one of format=gguf)" if dtype == "q8_0" else ""
        problems.append(f"dtype={dtype}: use float32, float16 or bfloat16{remark}")
    multiple = values.get("multiple")
    # isdigit alone also accepts "²".
    if multiple is not None and (not (multiple.isascii() and multiple.isdigit()) or int(multiple) < 1):
        problems.append(f"multiple={multiple}: give a whole number from 1")
    elif multiple is not None and format_name == "decilm" and int(multiple) % 256:
        problems.append(f"multiple={multiple}: format=decilm needs a multiple of 256; leave it out")
    elif multiple is not None and format_name == "gguf" and int(multiple) % 32:
        problems.append(
            f"multiple={multiple}: format=gguf needs a multiple of 32; leave it out, or use 256 for K-quants"
        )
    elif multiple is not None and format_name == "hf":
        problems.append("multiple: format=hf fills nothing up; use format=padded, or leave it out")
    if format_name == "gguf" and "to" in values and not values["to"].endswith(".gguf"):
        problems.append(f"to={values['to']}: a GGUF file is named *.gguf; use to={values['to'].rstrip('/')}.gguf")
    for key in ("path", "format"):
        if key not in values and not problems:
            problems.append(f"{key} is not set: give path=DIR format=FORMAT; see cfsp export --help")
    if problems:
        raise ConfigError(*problems)
    return Request(
        Path(values["path"]).expanduser(),
        format_name,
        Path(values["to"]).expanduser() if "to" in values else None,
        None if dtype is None else DTYPES.get(dtype, dtype),
        None if multiple is None else int(multiple),
    )


def _export(request: Request) -> int:
    result = write_export(request)
    print(f"{result.place}: {result.bytes / 2**20:,.1f} MiB, {result.format}")
    for note in result.notes:
        print(f"  {note}")
    return 0
