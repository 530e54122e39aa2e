"""The files that a run wrote: their sizes and hashes for the record, and what is damaged of them later."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cfsp.system.background_hash import sha256_of

#: A model card is for people to edit before they publish the folder: neither its size nor its content counts.
_EDITABLE = ("README.md",)
#: Entries of OUT that later stages and other tools need; each is a file or a folder.
PLAN_FILES = ("plan.json", "compensation.safetensors")
MODEL_FOLDERS = ("model", "pruned", "adapter")


def describe_files(out: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return path within OUT -> {bytes, sha256} of the files ``names``, and of every file in the folders ``names``.

    Weights that this process wrote were hashed on the way; the others (tokenizer, an adapter, a GGUF file) are read.

    Raises:
        OSError: a file cannot be read.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        for file in _files_of(out / name):
            path = file.relative_to(out).as_posix()
            found[path] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    return found


def damage(files: Mapping[str, Any], out: Path, *, hashes: bool = False) -> str | None:
    """Return one clause on the first file that is not as it was written; None where all are.

    Args:
        files: as :func:`describe_files` gave them, read back from a record.
        hashes: read every file and compare its sha256; else sizes alone.
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
    """Return the entries of ``files`` that are one of ``names`` or lie in a folder of that name."""
    wanted = tuple(names)
    listed = files.items() if isinstance(files, Mapping) else ()
    return {path: entry for path, entry in listed if path.split("/", 1)[0] in wanted}


def _files_of(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    return sorted(file for file in place.rglob("*") if file.is_file())
