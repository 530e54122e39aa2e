"""A folder that is there whole or not at all: written beside its place, then renamed."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from cfsp.errors import CheckpointError


@contextmanager
def whole_folder(folder: Path, key: str | None = None) -> Iterator[Path]:
    """A scratch folder to write to, which takes the place of ``folder`` when the block ends well.

    ``key``: names the scratch folder, so that what a killed process has left there is found again.

    Raises:
        CheckpointError: something cannot be written.
    """
    scratch = folder.with_name(f".{folder.name}.{key or uuid.uuid4().hex[:8]}")
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        yield scratch
        _replace(scratch, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: the model cannot be saved there ({error})") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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
