"""sha256 of files, computed while they are written so that nobody has to read them again."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

#: Smaller pieces are hashed at once: handing them to another thread takes longer.
_LARGE = 1 << 20
#: Device, inode, size and time of change of a file that this process wrote -> its sha256. A rename keeps all four.
_written: dict[tuple[int, int, int, int], str] = {}


class HashingWriter:
    """Write bytes to an open file and hash them meanwhile, in another thread: OpenSSL lets go of Python's lock."""

    def __init__(self, stream: BinaryIO, *, hashed: bool = True) -> None:
        """``hashed``: False for files whose digest nobody will ask for."""
        self._stream, self._hashed, self._digest = stream, hashed, hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)  # starts no thread until it is given work

    def write(self, data: bytes | memoryview) -> None:
        """Write and hash ``data``, which may be changed afterwards."""
        if not self._hashed:
            self._stream.write(data)
            return
        if len(data) < _LARGE:
            self._digest.update(data)
            self._stream.write(data)
            return
        hashed = self._thread.submit(self._digest.update, data)
        try:
            self._stream.write(data)
        finally:
            hashed.result()

    def close(self, *, whole: bool) -> None:
        """End the thread; ``whole``: all is on the disk and the digest is remembered for :func:`sha256_of`."""
        self._thread.shutdown()
        if whole and self._hashed:
            _written[_state(os.fstat(self._stream.fileno()))] = self._digest.hexdigest()


def sha256_of(file: Path) -> str:
    """Return the sha256 of a file in hexadecimal; remembered where this process wrote it and nobody changed it since.

    Raises:
        OSError: it cannot be read.
    """
    known = _written.get(_state(file.stat()))
    if known is not None:
        return known
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _state(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
