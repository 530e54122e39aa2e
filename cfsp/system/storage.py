"""One-line errors for runs stopped by a full, read-only or broken disk: the folder, its key and the free bytes."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cfsp.errors import CfspError, RunError
from cfsp.system.atomic import disk_error_code

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission to write is missing",
    errno.EPERM: "permission to write is missing",
    errno.EIO: "the disk reports an input/output error",
    errno.EISDIR: "a folder lies where a file is written",
    errno.ENOTDIR: "a file lies where a folder is needed",
}
#: Errors that free space would solve.
_ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def explained(places: Mapping[str, Path]) -> Iterator[None]:
    """Turn disk errors inside the context into one line.

    Args:
        places: key -> the folder that it names, e.g. ``{"paths.output_dir": Path("out")}``.

    Raises:
        RunError: a disk error; the line names key, folder, file and the free bytes.
    """
    try:
        yield
    except Exception as error:
        line = storage_problem(error, places)
        if line is None:
            raise
        raise RunError(line) from error


def storage_problem(error: BaseException, places: Mapping[str, Path]) -> str | None:
    """Return one line on the disk error that caused ``error``; None if no disk error did."""
    if isinstance(error, CfspError) and ("paths." in str(error) or "record=" in str(error)):
        return None  # the error names its key already
    causes = [link for link in _chain(error) if disk_error_code(link) is not None]
    if not causes:
        return None
    cause = next((link for link in causes if getattr(link, "filename", None)), causes[0])
    code = disk_error_code(cause) or 0
    filename = getattr(cause, "filename2", None) or getattr(cause, "filename", None)
    file = Path(os.fsdecode(filename)) if isinstance(filename, str | bytes) else None
    key = _key_of(file, places) if file is not None else None
    if key is None and code not in _ROOM:
        return None  # perhaps an unreadable input; the error itself says more
    if key is None and file is None and places:
        key = min(places, key=lambda name: free_bytes(places[name]))
    details = "" if not isinstance(error, CfspError) else re.sub(r" \(\[Errno \d+\] [^)]*\)", "", f": {error}")
    # The key names the folder already, and the line is bounded.
    details = re.sub(r"^: [^;]*: the model cannot be saved there", "", details)
    if key is None:
        free = f"{os.strerror(code)}; {free_bytes(Path(str(file))):,} bytes free"
        return f"{file}: {_REASONS[code]} ({free}){details}; make room there"
    folder = places[key]
    where = f"; writing {_within(file, folder)}" if file is not None and not details else ""
    free = f"; {free_bytes(folder):,} bytes free" if code in _ROOM else ""
    in_the_way = code in (errno.EISDIR, errno.ENOTDIR)
    remedy = "make room" if code in _ROOM else "remove what lies there" if in_the_way else "make it writable"
    way_out = "" if remedy in details else f"; {remedy} or give another {key}, then give the same command again"
    return f"{key}={folder}: {_REASONS[code]} ({os.strerror(code)}{free}{where}){details}{way_out}"


def free_bytes(folder: Path) -> int:
    """Return the bytes that this user may still write in ``folder``, which need not exist yet."""
    for place in (folder.absolute(), *folder.absolute().parents):
        try:
            status = os.statvfs(place)
        except OSError:
            continue
        return status.f_bavail * status.f_frsize
    return 0


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error, its causes and the errors that were being handled when it was raised."""
    visited: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        link = pending.pop(0)
        if link is None or id(link) in visited:
            continue
        visited.add(id(link))
        yield link
        pending += [link.__cause__, None if link.__suppress_context__ else link.__context__]


def _key_of(file: Path, places: Mapping[str, Path]) -> str | None:
    """Return the key of the innermost folder that contains ``file``."""
    path = _resolved(file)
    inside = [key for key, folder in places.items() if path.is_relative_to(_resolved(folder))]
    return max(inside, key=lambda key: len(_resolved(places[key]).parts), default=None)


def _within(file: Path, folder: Path) -> str:
    path = _resolved(file)
    return str(path.relative_to(_resolved(folder))) if path != _resolved(folder) else path.name


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return path.absolute()
