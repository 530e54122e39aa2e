"""A cache of computed values on disk by content, shared by processes."""

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
from cfsp.system.lease import waited

log = logging.getLogger(__name__)


Value = TypeVar("Value")


#: What the values that were read instead of computed had cost, in seconds; None: not known of one of them.
_saved: ContextVar[list[float | None] | None] = ContextVar("saved", default=None)


def read_or_compute(
    path: Path | None,
    read: Callable[[Path], Value],
    compute: Callable[[], Value],
    write: Callable[[Value, Path], object],
) -> tuple[Value, bool]:
    """The value in ``path``, or a new one, which is then kept there atomically; returns (value, cached?).

    Of several processes that want it at the same time one computes it, the others wait and read. ``path`` None: nothing
    is kept. A file that is damaged (its sha256 stands beside it) or that ``read`` refuses is made again. Beside the
    file stands how many seconds it took (:func:`saved_seconds`).
    """
    if path is None:
        return compute(), False
    found = _kept(path, read)
    if found:
        _note_saved(path)
        return found[0], True
    kind, asked = path.parent.name, time.perf_counter()
    with waited(path.with_name(f".{path.stem}.lease"), lambda who: log.info("waiting for %s (%s)", kind, who)):
        found = _kept(path, read, quiet=True)
        if found:
            _note_saved(path, waited=time.perf_counter() - asked)
            return found[0], True
        remove_partials(path)
        start = time.perf_counter()
        value = compute()
        write_text(_cost_of(path), f"{time.perf_counter() - start:.6f}\n")  # its folder may have gone meanwhile
        _digest_of(path).unlink(missing_ok=True)
        with replacing(path) as partial:
            write(value, partial)
            digest = sha256_of(partial)
        write_text(_digest_of(path), f"{digest}\n")
    return value, False


def remove_partials(path: Path) -> None:
    """Remove what processes that were killed have left of ``path``; the caller alone may write it."""
    earlier_names = path.parent.glob(f"{glob.escape(path.stem)}.*.partial")  # of earlier versions
    for partial in (*path.parent.glob(f".{glob.escape(path.name)}.*"), *earlier_names):
        if partial.is_file() and partial.name.removesuffix(".partial").rpartition(".")[2].isdigit():
            with suppress(OSError):
                partial.unlink()


@contextmanager
def saved_seconds(entry: dict[str, Any]) -> Iterator[None]:
    """Put into ``entry["saved_seconds"]`` what all that was read inside had taken to compute; None: not known."""
    token = _saved.set([])
    try:
        yield
    finally:
        costs = _saved.get() or []
        _saved.reset(token)
        known = [cost for cost in costs if cost is not None]
        entry["saved_seconds"] = sum(known) if len(known) == len(costs) else None


def _cost_of(path: Path) -> Path:
    return path.with_suffix(".seconds")


def _digest_of(path: Path) -> Path:
    """Return where the sha256 of ``path`` stands; earlier versions kept none."""
    return path.with_suffix(".sha256")


def note_saved(seconds: float | None) -> None:
    """Something that took so long to compute was read instead; None: not known how long."""
    costs = _saved.get()
    if costs is not None:
        costs.append(seconds)


def _note_saved(path: Path, *, waited: float = 0.0) -> None:
    """``waited``: seconds in which another process made it, which are in the time of the stage already."""
    cost = None
    with suppress(OSError, ValueError):
        cost = max(0.0, float(_cost_of(path).read_text(encoding="utf-8")) - waited)
    note_saved(cost)


def _kept(path: Path, read: Callable[[Path], Value], *, quiet: bool = False) -> tuple[Value] | None:
    if not path.is_file():
        return None
    try:
        with suppress(FileNotFoundError):
            if _digest_of(path).read_text(encoding="ascii").strip() != sha256_of(path):
                raise ValueError("its content is not what was written")
        return (read(path),)
    except Exception as error:  # any damage: the file can be made again
        if not quiet:
            log.warning("cached %s %s cannot be read (%s); computing it again", path.parent.name, path.name, error)
        return None
