"""Digests of files, remembered from one process to the next."""

from __future__ import annotations

import hashlib
import re
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from cfsp.system.atomic import write_text

#: Files that are hashed at the same time; smaller files than this many bytes are not worth a note.
READERS, _LARGE = 4, 16_000_000


_NOTE = re.compile("[0-9a-f]{64}")


def file_digest(path: Path, kept: Path | None = None) -> str:
    """sha256 of a file's content; read once in a process while size, times of change and inode stay as they are.

    ``kept``: a folder where the digests of large files are written down for other processes.
    """
    found = path.stat()
    # A second change within a tick of the file system's clock would not show.
    if time.time() - max(found.st_mtime, found.st_ctime) < 2:
        return _digest_of.__wrapped__(path, (), None)
    state = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)
    return _digest_of(path.resolve(), state, kept if found.st_size >= _LARGE else None)


@lru_cache(maxsize=4096)
def _digest_of(path: Path, state: tuple[int, ...], kept: Path | None) -> str:
    note = None if kept is None else kept / hashlib.sha256(f"{path} {state}".encode()).hexdigest()[:32]
    if note is not None:
        with suppress(OSError):
            found = note.read_text(encoding="ascii")
            if _NOTE.fullmatch(found):
                return found
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if note is not None:
        with suppress(OSError):  # the next process reads the file again
            write_text(note, digest)
    return digest
