"""Digests of files, cached across processes."""

from __future__ import annotations

import hashlib
import re
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from cfsp.system.atomic import write_text

#: Number of files that are hashed at the same time.
READERS = 4
#: Bytes from which the digest of a file is stored for other processes.
_LARGE = 16_000_000
_NOTE = re.compile("[0-9a-f]{64}")


def file_digest(path: Path, kept: Path | None = None) -> str:
    """Return the sha256 of a file's content in hexadecimal.

    A process reads a file only once while its size, times of change and inode stay the same.

    Args:
        path: the file.
        kept: folder in which the digests of large files are stored for other processes; None: they are not stored.
    """
    status = path.stat()
    # A second change within one tick of the file system's clock would not be visible.
    if time.time() - max(status.st_mtime, status.st_ctime) < 2:
        return _digest_of.__wrapped__(path, (), None)
    state = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)
    return _digest_of(path.resolve(), state, kept if status.st_size >= _LARGE else None)


@lru_cache(maxsize=4096)
def _digest_of(path: Path, state: tuple[int, ...], kept: Path | None) -> str:
    note = None if kept is None else kept / hashlib.sha256(f"{path} {state}".encode()).hexdigest()[:32]
    if note is not None:
        with suppress(OSError):
            stored = note.read_text(encoding="ascii")
            if _NOTE.fullmatch(stored):
                return stored
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if note is not None:
        with suppress(OSError):  # then the next process hashes the file again
            write_text(note, digest)
    return digest
