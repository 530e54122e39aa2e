"""Compute sha256 digests of files while they are written, so that the files need not be read again."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

#: Bytes from which a piece is hashed in another thread; for smaller pieces the hand-over takes longer than the hash.
_LARGE = 1 << 20
#: Device, inode, size and modification time of each file that this process wrote -> its sha256. A rename keeps them.
_written: dict[tuple[int, int, int, int], str] = {}


class HashingWriter:
    """Writer that hashes bytes in another thread while it writes them to an open file.

    OpenSSL releases Python's global lock, so hashing and writing overlap.
    """

    def __init__(self, stream: BinaryIO, *, hashed: bool = True) -> None:
        """Wrap an open file.

        Args:
            stream: binary file, open for writing.
            hashed: False for files whose digest is not needed.
        """
        self._stream, self._hashed, self._digest = stream, hashed, hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)  # starts its thread with the first task

    def write(self, data: bytes | memoryview) -> None:
        """Write and hash ``data``; the caller may change the buffer afterwards."""
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
        """End the thread.

        Args:
            whole: whether the whole content is on the disk, so that :func:`sha256_of` may reuse its digest.
        """
        self._thread.shutdown()
        if whole and self._hashed:
            _written[_state(os.fstat(self._stream.fileno()))] = self._digest.hexdigest()


def sha256_of(file: Path) -> str:
    """Return the sha256 of a file in hexadecimal.

    The digest is reused if this process wrote the file through :class:`HashingWriter` and the file is unchanged.

    Raises:
        OSError: the file cannot be read.
    """
    known = _written.get(_state(file.stat()))
    if known is not None:
        return known
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _state(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
