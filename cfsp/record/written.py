"""Files that a run wrote: their sizes and hashes for the record, and the check for damage later."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cfsp.system.background_hash import sha256_of

#: Files that people may edit before they publish the folder (the model card); their size and content do not count.
_EDITABLE = ("README.md",)
#: Entries of OUT that later stages and other tools need; each is a file or a folder.
PLAN_FILES = ("plan.json", "compensation.safetensors")
MODEL_FOLDERS = ("model", "pruned", "adapter")


def describe_files(out: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return path within OUT -> {bytes, sha256} of the files ``names``, and of every file in the folders ``names``.

    Weights that this process wrote were hashed while writing. The other files (tokenizer, adapter, GGUF) are read.

    Args:
        out: OUT of the run.
        names: entries of OUT.

    Raises:
        OSError: a file cannot be read.
    """
    described: dict[str, dict[str, Any]] = {}
    for name in names:
        for file in _list_files(out / name):
            path = file.relative_to(out).as_posix()
            described[path] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    return described


def damage(files: Mapping[str, Any], out: Path, *, hashes: bool = False) -> str | None:
    """Return a clause on the first file that is not as it was written; None where all are.

    Args:
        files: entries of :func:`describe_files`, read back from a record.
        out: OUT of the run.
        hashes: read every file and compare its sha256; otherwise only sizes are compared.
    """
    for name, written in files.items():
        if Path(name).name in _EDITABLE:
            continue
        try:
            size = os.stat(out / name).st_size
            if size != written["bytes"]:
                return f"{name} has {size:,} bytes where {written['bytes']:,} were written"
            if hashes and sha256_of(out / name) != written["sha256"]:
                return f"{name} has another content than was written (sha256 differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, KeyError, TypeError, ValueError) as error:
            return f"{name} cannot be compared with the record ({error})"
    return None


def within(files: Mapping[str, Any] | None, names: Iterable[str]) -> dict[str, Any]:
    """Return the entries of ``files`` that are among ``names`` or lie in a folder of such a name."""
    selected = tuple(names)
    listed = files.items() if isinstance(files, Mapping) else ()
    return {path: entry for path, entry in listed if path.split("/", 1)[0] in selected}


def _list_files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    return sorted(file for file in place.rglob("*") if file.is_file())
