"""Cache of computed values on disk, keyed by content and shared by processes.

Values are JSON and safetensors files that load without running code, under a lease that survives killed processes.
joblib and diskcache pickle what they keep.
"""

from __future__ import annotations

import glob
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from cfsp.system.atomic import replacing, write_text
from cfsp.system.background_hash import sha256_of
from cfsp.system.lease import hold_lease

log = logging.getLogger(__name__)

Value = TypeVar("Value")
#: Seconds that each value took to compute that was read from the cache instead; None: not known.
_saved: ContextVar[list[float | None] | None] = ContextVar("saved", default=None)


def read_or_compute(
    path: Path | None,
    read: Callable[[Path], Value],
    compute: Callable[[], Value],
    write: Callable[[Value, Path], object],
) -> tuple[Value, bool]:
    """Return the value stored at ``path``; compute and store it if there is none.

    If several processes need the value at the same time, one computes it and the others wait and read. A damaged file
    (it does not match the sha256 stored beside it), or one that ``read`` refuses, is computed again. The seconds that
    this took are stored beside the file (:func:`saved_seconds`).

    Args:
        path: file of the value; None: nothing is stored.
        read: loads the value from a file.
        compute: computes the value.
        write: writes the value to a file.

    Returns:
        The value, and whether it was read from the cache.
    """
    if path is None:
        return compute(), False
    stored = _read_stored(path, read)
    if stored:
        _note_saved(path)
        return stored[0], True
    kind, requested = path.parent.name, time.perf_counter()
    with hold_lease(path.with_name(f".{path.stem}.lease"), lambda who: log.info("waiting for %s (%s)", kind, who)):
        stored = _read_stored(path, read, quiet=True)
        if stored:
            _note_saved(path, waited=time.perf_counter() - requested)
            return stored[0], True
        remove_partials(path)
        start = time.perf_counter()
        value = compute()
        write_text(_seconds_file(path), f"{time.perf_counter() - start:.6f}\n")  # creates its folder again
        _digest_file(path).unlink(missing_ok=True)
        with replacing(path) as partial:
            write(value, partial)
            digest = sha256_of(partial)
        write_text(_digest_file(path), f"{digest}\n")
    return value, False


def remove_partials(path: Path) -> None:
    """Remove partial files of ``path`` that killed processes left; the caller must hold the lease on ``path``."""
    earlier_names = path.parent.glob(f"{glob.escape(path.stem)}.*.partial")  # written by earlier versions of cfsp
    for partial in (*path.parent.glob(f".{glob.escape(path.name)}.*"), *earlier_names):
        if partial.is_file() and partial.name.removesuffix(".partial").rpartition(".")[2].isdigit():
            with suppress(OSError):
                partial.unlink()


@contextmanager
def saved_seconds(entry: dict[str, Any]) -> Iterator[None]:
    """Set ``entry["saved_seconds"]`` to the seconds that the values read inside took to compute; None: not known."""
    token = _saved.set([])
    try:
        yield
    finally:
        costs = _saved.get() or []
        _saved.reset(token)
        known = [cost for cost in costs if cost is not None]
        entry["saved_seconds"] = sum(known) if len(known) == len(costs) else None


def _seconds_file(path: Path) -> Path:
    return path.with_suffix(".seconds")


def _digest_file(path: Path) -> Path:
    """Return the file with the sha256 of ``path``; earlier versions of cfsp wrote none."""
    return path.with_suffix(".sha256")


def note_saved(seconds: float | None) -> None:
    """Count ``seconds`` as saved by reading a value instead of computing it; None: not known."""
    costs = _saved.get()
    if costs is not None:
        costs.append(seconds)


def _note_saved(path: Path, *, waited: float = 0.0) -> None:
    """Count the stored cost of ``path`` as saved.

    Args:
        path: file of the value.
        waited: seconds of waiting for another process to compute it; the stage's time contains them already.
    """
    cost = None
    with suppress(OSError, ValueError):
        cost = max(0.0, float(_seconds_file(path).read_text(encoding="utf-8")) - waited)
    note_saved(cost)


def _read_stored(path: Path, read: Callable[[Path], Value], *, quiet: bool = False) -> tuple[Value] | None:
    if not path.is_file():
        return None
    try:
        with suppress(FileNotFoundError):
            if _digest_file(path).read_text(encoding="ascii").strip() != sha256_of(path):
                raise ValueError("its content is not what was written")
        return (read(path),)
    except Exception as error:  # any damage: the value can be computed again
        if not quiet:
            log.warning("cached %s %s cannot be read (%s); computing it again", path.parent.name, path.name, error)
        return None
