"""Bounded reading of untrusted files.

Model folders, plans, records and texts are read with these functions. So a FIFO, a device, a file of many gigabytes or
JSON that is nested 100,000 levels deep gives one line of error instead of a process that never ends.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from cfsp.errors import CfspError, CheckpointError

#: Largest JSON or YAML file that is read. A tokenizer.json of 262,144 entries has 35 MB.
MAX_STRUCTURED_BYTES = 400_000_000


def check_regular(path: Path, label: str, *, error: type[CfspError] = CheckpointError) -> None:
    """Refuse a path that is not a regular file: opening a FIFO waits for a writer, and a device may never end.

    Args:
        path: the file; links are followed.
        label: how the message names the file, e.g. ``calibration.path=FILE``.
        error: the class of the error.

    Raises:
        CfspError: an ``error``: there is no such file, or it is a folder, a FIFO, a socket or a device.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as problem:  # ValueError: a null byte in the name
        reason = getattr(problem, "strerror", None) or str(problem)
        raise error(f"{label}: cannot be read ({reason}); give a file that is there and readable") from problem
    if stat.S_ISDIR(mode):
        raise error(f"{label}: this is a folder; give a file")
    if not stat.S_ISREG(mode):
        raise error(f"{label}: this is a FIFO, a socket or a device; give a regular file")


def read_bytes(
    path: Path, label: str, *, limit: int = MAX_STRUCTURED_BYTES, error: type[CfspError] = CheckpointError
) -> bytes:
    """Read a whole regular file of at most ``limit`` bytes.

    Raises:
        CfspError: an ``error``: the file is not regular, too large or not readable.
    """
    check_regular(path, label, error=error)
    size = path.stat().st_size
    if size > limit:
        raise error(f"{label}: it has {size:,} bytes, at most {limit:,} are read; it is not a file of this kind")
    try:
        return path.read_bytes()
    except OSError as problem:
        raise error(f"{label}: cannot be read ({problem.strerror}); see that it is readable") from problem


def read_text(
    path: Path, label: str, *, limit: int = MAX_STRUCTURED_BYTES, error: type[CfspError] = CheckpointError
) -> str:
    """Read a whole UTF-8 file; a byte order mark at its start is dropped.

    Raises:
        CfspError: an ``error``: as for :func:`read_bytes`, or the bytes are not UTF-8.
    """
    content = read_bytes(path, label, limit=limit, error=error)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{label}: byte {problem.start} is not UTF-8; save the file as UTF-8") from problem


def read_json(
    path: Path, label: str, *, limit: int = MAX_STRUCTURED_BYTES, error: type[CfspError] = CheckpointError
) -> Any:
    """Read a JSON file with any value.

    Raises:
        CfspError: an ``error``: as for :func:`read_text`, or the text is not JSON or nested too deeply.
    """
    return parse_json(read_text(path, label, limit=limit, error=error), label, error=error)


def parse_json(text: str, label: str, *, error: type[CfspError] = CheckpointError) -> Any:
    """Parse JSON text.

    Raises:
        CfspError: an ``error``: the text is not JSON or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as problem:
        raise error(f"{label}: the JSON is nested too deep; no file of this kind is") from problem
    except ValueError as problem:
        raise error(f"{label}: not valid JSON ({problem}); fetch or write the file again") from problem
