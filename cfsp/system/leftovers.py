"""Recognise and remove hidden files and folders that killed processes left behind."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: Seconds that writing a small file never takes; an older partial file was left by a dead process.
_LONGEST_WRITE = 60.0
_SCRATCH = r"\.(?P<name>{names})\.[0-9a-f]{{8}}(?P<old>\.old)?"
_PARTIAL = r"\.(?P<name>{names})\.(?P<process>\d{{1,10}})"


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold a lock on a file or folder inside the context (:func:`is_locked`). It also ends with this process."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Return whether a process of this machine is inside :func:`hold_lock` with ``path``."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def remove_scratch(folder: Path, names: Iterable[str]) -> None:
    """Remove scratch copies ``.NAME.XXXXXXXX`` of files and folders that no process writes any more.

    If a process died while it replaced a folder and the new folder does not exist, the old folder gets its name back.

    Args:
        folder: folder that contains the copies.
        names: names of the files and folders that have such copies.
    """
    pattern = re.compile(_SCRATCH.format(names="|".join(map(re.escape, names))))
    for path, match in _matches(folder, pattern):
        if is_locked(path):
            continue
        if match["old"] and not (folder / match["name"]).exists():
            with suppress(OSError):
                path.rename(folder / match["name"])
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def remove_partials(folder: Path, names: Iterable[str]) -> None:
    """Remove partial files ``.NAME.PROCESS`` in ``folder`` whose process is dead."""
    pattern = re.compile(_PARTIAL.format(names="|".join(map(re.escape, names))))
    for path, match in _matches(folder, pattern):
        with suppress(OSError):
            if not _is_alive(int(match["process"])) or time.time() - path.lstat().st_mtime > _LONGEST_WRITE:
                path.unlink()


def _matches(folder: Path, pattern: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    try:
        paths = sorted(folder.iterdir())
    except OSError:
        return []
    return [(path, match) for path in paths if (match := pattern.fullmatch(path.name)) is not None]


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # a process of another user
        return True
    return True
