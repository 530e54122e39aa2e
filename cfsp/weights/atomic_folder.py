"""A folder that is there whole or not at all: written beside its place, then renamed."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from cfsp.errors import CheckpointError
from cfsp.system.leftovers import held, is_held


@contextmanager
def whole_folder(folder: Path, key: str | None = None) -> Iterator[Path]:
    """A scratch folder to write to, which takes the place of ``folder`` when the block ends well.

    ``key``: names the scratch folder, so that the weight files that a run has finished there before it was stopped (a
    kill, Ctrl-C, a full disk) are found again by the next one. They stay after an error too, which says where.

    Raises:
        CheckpointError: something cannot be written.
    """
    scratch = folder.with_name(f".{folder.name}.{key or uuid.uuid4().hex[:8]}")
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        with held(scratch):
            yield scratch
            _replace(scratch, folder)
        _remove_others(folder)
    except (OSError, SafetensorError) as error:
        said = f"{folder}: the model cannot be saved there ({error})"
        finished = len(_finished(scratch)) if key else 0
        if finished:
            said += (
                f"; {finished} finished weight files stay in {scratch}: make room and the same run goes on with them, "
                "or delete that folder"
            )
        raise CheckpointError(said) from error
    finally:
        if not (key and _finished(scratch)):
            shutil.rmtree(scratch, ignore_errors=True)
        for partial in scratch.glob("*.partial"):  # of no use, and as large as a weight file
            with suppress(OSError):
                partial.unlink()


def _remove_others(folder: Path) -> None:
    """Remove what earlier saves to ``folder`` left that were stopped; those of living processes are held."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.([0-9a-f]{{8}}|[0-9a-f]{{16}})")
    for path in folder.parent.iterdir():
        if pattern.fullmatch(path.name) and not is_held(path):
            shutil.rmtree(path, ignore_errors=True)


def _finished(scratch: Path) -> list[Path]:
    return list(scratch.glob("*.safetensors"))


def _replace(scratch: Path, folder: Path) -> None:
    if not folder.exists():
        scratch.rename(folder)
        return
    retired = scratch.with_name(scratch.name + ".old")
    folder.rename(retired)
    try:
        scratch.rename(folder)
    except OSError:
        retired.rename(folder)
        raise
    shutil.rmtree(retired)
