"""Write files atomically, and make disk errors name the file.

Records, plans, cards and cached values are written with these functions. The content is written to a file beside its
place, which is then renamed. So a reader never sees half a file, and a symbolic link is replaced, never followed.

The standard library's ``os.replace`` carries the weight. The packages for it (atomicwrites) are no longer kept, and
none says which key of the configuration a full disk belongs to.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: Error numbers that concern the disk, or what lies on it, and not the program.
DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EISDIR,
    errno.ENOTDIR,
)
#: Messages of libraries that raise another class than OSError; torch.save says no more than this when a disk is full.
_TEXTS = {
    "no space left": errno.ENOSPC,
    "enforce fail at inline_container": errno.ENOSPC,
    "pytorchstreamwriter failed writing": errno.ENOSPC,
    "disk quota exceeded": errno.EDQUOT,
    "read-only file system": errno.EROFS,
}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def disk_error_code(error: BaseException) -> int | None:
    """Return the errno of a disk error, whichever library raised it; None for other errors."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in DISK_ERRORS else None
    text = str(error)
    numbered = _OS_ERROR.search(text)  # the form in which safetensors, written in Rust, states it
    if numbered:
        code = int(numbered.group(1))
        return code if code in DISK_ERRORS else None
    return next((code for words, code in _TEXTS.items() if words in text.lower()), None)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make disk errors that are raised inside name ``path``.

    Raises:
        OSError: a disk error with ``path`` as its filename, also where torch or safetensors raised another class.
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
    """Yield a file beside ``path`` to write to; it replaces ``path`` when the block ends without an error.

    A missing folder is created. The file gets the mode that the process's umask gives to new files, whatever mode the
    writing library chose. After an error no partial file stays behind.

    Raises:
        OSError: the disk refused; the error names the file.
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
    """Return the file to which this process writes the future content of ``path``."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all.

    Raises:
        OSError: the disk refused; the error names the file.
    """
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write ``content`` as UTF-8 to ``path``, whole or not at all.

    Raises:
        OSError: the disk refused; the error names the file.
    """
    write_bytes(path, content.encode("utf-8"))
