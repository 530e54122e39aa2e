"""Token ids of a ``.npy`` file, mapped into memory so that only the needed part is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from cfsp.errors import DataError
from cfsp.system.reading import check_regular

#: Most bytes of a header; the header of a plain array has 128.
_HEADER = 10_000


def open_ids(path: Path, label: str) -> np.ndarray:
    """Map the token ids of a file into memory.

    Args:
        path: the ``.npy`` file.
        label: how messages name the file, ``calibration.path=FILE``.

    Returns:
        Token ids [n, T] in the file's integer type and memory order.

    Raises:
        DataError: it is no ``.npy`` file, has another type or shape, or is shorter than its header says.
    """
    if not path.exists():
        raise DataError(f"{label}: no such file; give a .npy file of token ids, shape [n, T]")
    check_regular(path, label, error=DataError)
    try:
        shape, fortran, dtype, offset = _header(path, label)
    except DataError:
        raise
    except Exception as error:  # the header is a Python literal, and damage can raise any error
        raise DataError(f"{label}: not a .npy file of numbers (damaged header); write it with numpy.save") from error
    if dtype.kind not in "iu":
        raise DataError(f"{label}: token ids must be integers, found {dtype if dtype.names is None else 'records'}")
    if len(shape) != 2 or 0 in shape or any(size < 0 for size in shape):
        raise DataError(f"{label}: token ids of shape [n, T] are needed, found shape {_shown(shape)}")
    if shape[1] < 2:
        raise DataError(
            f"{label}: rows of one token, shape {_shown(shape)}; windows of at least 2 are needed, shape [n, T]"
        )
    needed, size = offset + math.prod(shape) * dtype.itemsize, path.stat().st_size
    if needed > size:
        raise DataError(
            f"{label}: cut off: shape {_shown(shape)} takes {needed:,} bytes, the file has {size:,}; write it again"
        )
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape, order="F" if fortran else "C")


def _header(path: Path, label: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    with path.open("rb") as stream:
        start = stream.read(6)
        if start.startswith(b"PK\x03\x04"):
            raise DataError(f"{label}: an archive of arrays (.npz); save one array of shape [n, T] with numpy.save")
        if start != b"\x93NUMPY":
            raise DataError(f"{label}: not a .npy file (other first bytes); write it with numpy.save")
        stream.seek(0)
        major, _ = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream, max_header_size=_HEADER)
        if dtype.hasobject:
            raise DataError(f"{label}: not a .npy file of numbers (Python objects); write integers with numpy.save")
        return tuple(int(size) for size in shape), bool(fortran), dtype, stream.tell()


def _shown(shape: tuple[int, ...]) -> str:
    text = str(shape) if all(abs(size) < 10**20 for size in shape[:8]) else "of absurd size"
    return text if len(text) <= 100 else f"{text[:97]}..."
