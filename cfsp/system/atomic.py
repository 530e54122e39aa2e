"""Writing a file whole or not at all, and errors of a disk that name the file.

Every writer of a record, a plan, a card or a cached value goes through here: the content is written beside its place
and then renamed, so a reader never sees half a file, and a symbolic link in its place is replaced, never followed.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: Errors that say something about the disk and not about the program.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
#: Texts of libraries that raise another class than OSError: torch.save does not say more when a disk is full.
_TEXTS = {
    "no space left": errno.ENOSPC,
    "enforce fail at inline_container": errno.ENOSPC,
    "pytorchstreamwriter failed writing": errno.ENOSPC,
    "disk quota exceeded": errno.EDQUOT,
    "read-only file system": errno.EROFS,
}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def disk_error_code(error: BaseException) -> int | None:
    """Return the errno of an error of the disk, whichever library raised it; None for other errors."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in DISK_ERRORS else None
    text = str(error)
    numbered = _OS_ERROR.search(text)  # how safetensors, written in Rust, names it
    if numbered:
        code = int(numbered.group(1))
        return code if code in DISK_ERRORS else None
    return next((code for words, code in _TEXTS.items() if words in text.lower()), None)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make errors of the disk name ``path``.

    Raises:
        OSError: with ``path`` as its filename, also where torch or safetensors raised an error of another class.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    except Exception as error:
        code = disk_error_code(error)
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file beside ``path`` to write to, which takes its place when the block ends well.

    The folder is made where it is missing. The file gets the mode that the process's umask gives to new files, whatever
    the library that wrote it chose. After an error nothing stays behind.

    Raises:
        OSError: names the file.
    """
    partial = partial_of(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.unlink(missing_ok=True)
            descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            mode = os.fstat(descriptor).st_mode & 0o777
            os.close(descriptor)
            yield partial
            if partial.stat().st_mode & 0o777 != mode:
                partial.chmod(mode)
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def partial_of(path: Path) -> Path:
    """Return where this process writes the content that is to become ``path``."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all.

    Raises:
        OSError: names the file.
    """
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write ``content`` as UTF-8 to ``path``, whole or not at all.

    Raises:
        OSError: names the file.
    """
    write_bytes(path, content.encode("utf-8"))
