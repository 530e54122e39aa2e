"""Atomic writing of a folder: it is written beside its place, then renamed, so that it is there whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from cfsp.errors import CheckpointError
from cfsp.system.atomic import disk_error_code
from cfsp.system.leftovers import hold_lock, is_locked


@contextmanager
def atomic_folder(folder: Path, key: str | None = None) -> Iterator[Path]:
    """Yield a scratch folder to write to, which takes the place of ``folder`` when the block ends without an error.

    Args:
        folder: the folder to write; an older one is replaced.
        key: names the scratch folder, so that the next run uses the weight files that a stopped run (killed,
            interrupted, or by a full disk) has finished there. They also stay after an error, which names the folder.

    Raises:
        CheckpointError: something cannot be written.
    """
    scratch = folder.with_name(f".{folder.name}.{key or uuid.uuid4().hex[:8]}")
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        with hold_lock(scratch):
            yield scratch
            _replace(scratch, folder)
        _remove_others(folder)
    except Exception as error:
        code = disk_error_code(error)  # tokenizers raises the bare class for a full disk
        if code is None and not isinstance(error, OSError | SafetensorError):
            raise
        file = _being_written(scratch, error)
        reason = str(error) if code is None else f"[Errno {code}] {os.strerror(code)}"
        message = f"{folder}: the model cannot be saved there{f': {file.name} failed' if file else ''} ({reason})"
        finished = len(_finished(scratch)) if key else 0
        if finished:
            message += (
                f"; {finished} finished weight files stay in {scratch}: make room and the same run goes on with them, "
                "or delete that folder"
            )
        if code is None or file is None:
            raise CheckpointError(message) from error
        cause = OSError(code, os.strerror(code), str(file))  # by its file the key of the full disk is found
        cause.__cause__ = error
        raise CheckpointError(message) from cause
    finally:
        if not (key and _finished(scratch)):
            shutil.rmtree(scratch, ignore_errors=True)
        for partial in scratch.glob("*.partial"):  # of no use, and as large as a weight file
            with suppress(OSError):
                partial.unlink()


def _being_written(scratch: Path, error: Exception) -> Path | None:
    """Return the file that could not be written: the one that the error names, else the newest one."""
    named = getattr(error, "filename", None)
    if isinstance(named, str):
        return Path(named)
    with suppress(OSError):
        files = [(file.stat().st_mtime_ns, file) for file in scratch.rglob("*") if file.is_file()]
        return max(files)[1] if files else None
    return None


def _remove_others(folder: Path) -> None:
    """Remove the scratch folders that stopped saves to ``folder`` left; scratch folders of running processes stay."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.([0-9a-f]{{8}}|[0-9a-f]{{16}})")
    for path in folder.parent.iterdir():
        if pattern.fullmatch(path.name) and not is_locked(path):
            shutil.rmtree(path, ignore_errors=True)


def _finished(scratch: Path) -> list[Path]:
    """Return the weight files that are complete; others still have another suffix."""
    return list(scratch.glob("*.safetensors"))


def _replace(scratch: Path, folder: Path) -> None:
    """Rename ``scratch`` to ``folder``; an older folder comes back where that fails."""
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
