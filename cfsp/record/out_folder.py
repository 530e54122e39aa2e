"""Folder of a run (OUT): apart from the model that it reads, and the same folder from beginning to end."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cfsp.errors import ConfigError, RunError
from cfsp.record.written import MODEL_FOLDERS, PLAN_FILES
from cfsp.system.leftovers import remove_partials, remove_scratch
from cfsp.system.library_logs import write_early_records

#: Formats whose export lies in OUT beside the model, as ``model-FORMAT``.
_EXPORTS = ("model-padded", "model-decilm", "model.gguf")
_FILES = ("record.json", "record.repeat.json", *PLAN_FILES, "config.yaml", "blocks.png", "recovery.png")
_CARDS = ("README.md", "cfsp_card.json")


class OutputGoneError(RunError):
    """OUT was removed or replaced while its run went on."""


def check_apart(out: Path, model: Path) -> None:
    """Check that a run can write to ``out`` without touching the folder ``model`` that it reads; links are followed.

    Raises:
        ConfigError: OUT is the model folder or lies in it, or the model lies where the run writes its own.
    """
    out_place, model_place = _resolved(out), _resolved(model)
    if out_place == model_place:
        problem = "is the model folder (model.path), whose files would be mixed with the run's"
    elif model_place in out_place.parents:
        problem = f"lies in the model folder {model}"
    else:
        written = (*MODEL_FOLDERS, *_EXPORTS)
        place = next((name for name in written if _is_within(model_place, _resolved(out / name))), None)
        if place is None:
            return
        problem = f"the run would replace {place} in it, where the model folder {model} is"
    raise ConfigError(f"paths.output_dir={out}: {problem}; give another folder")


def check_outside(key: str, folder: Path, model: Path) -> None:
    """Refuse a folder of the run's own in the model folder, whose files would be mixed with it; links are followed.

    Args:
        key: configuration key of the folder, e.g. ``paths.cache_dir``.
        folder: the folder.
        model: the model folder.

    Raises:
        ConfigError: ``folder`` is the model folder or lies in it.
    """
    if _is_within(_resolved(folder), _resolved(model)):
        raise ConfigError(
            f"{key}={folder}: lies in the model folder (model.path), which a run only reads; give another"
        )


def check_entries(out: Path) -> None:
    """Refuse anything but files in the places of OUT where the run writes files.

    Raises:
        ConfigError: a folder, a FIFO or a device is there, which would be met when the work is done.
    """
    for name in (*_FILES, "run.log"):
        place = out / name
        if place.exists() and not place.is_file():
            kind = "a folder" if place.is_dir() else "a FIFO, a socket or a device"
            raise ConfigError(
                f"paths.output_dir={out}: {name} in it is {kind}, where the run writes a file; remove it, or give "
                "another folder"
            )


def remove_empty(out: Path, model: Path) -> None:
    """Remove the empty folders on the way from the model folder to ``out``, which Hydra has made for the run."""
    place, stop = _resolved(out), _resolved(model)
    with suppress(OSError):
        while stop in place.parents:
            place.rmdir()
            place = place.parent


def remove_leftovers(out: Path, records: Path, run_id: str) -> None:
    """Remove what dead processes have left of this run; only the process that holds its lease may call it.

    Args:
        out: OUT of the run.
        records: folder of records.
        run_id: id of the run.
    """
    remove_scratch(out, (*MODEL_FOLDERS, *_EXPORTS))
    remove_partials(out, _FILES)
    for pattern in (".write-test-*", "..lease.*"):  # the lease itself is .lease, which is held
        for file in out.glob(pattern):
            with suppress(OSError):
                file.unlink()
    for name in MODEL_FOLDERS[:2]:
        remove_partials(out / name, _CARDS)
    remove_partials(records, [f"{run_id}.json"])


class OutFolder:
    """The folder OUT as it was when the run began.

    Args:
        path: the folder, which exists.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._identity = path, _identity(path)
        # While the folder is open, its inode cannot be given to a folder that replaces it.
        weakref.finalize(self, os.close, os.open(path, os.O_RDONLY))

    @property
    def is_gone(self) -> bool:
        """Return whether the folder has been removed or replaced since."""
        return self._identity is None or _identity(self.path) != self._identity

    def check(self, names: Iterable[str] = ()) -> None:
        """Check that the folder is still there, with the files ``names``.

        Raises:
            OutputGoneError: the folder was removed or replaced, or a file was removed.
        """
        lost = "the folder" if self.is_gone else next((n for n in names if not (self.path / n).is_file()), None)
        if lost is not None:
            raise OutputGoneError(
                f"paths.output_dir={self.path}: {lost} was removed while the run went on, so what it wrote there is "
                "lost; give the same command again (what is in paths.cache_dir is used again)"
            )


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Append what is logged inside to ``path``; a symbolic link there is replaced, and its target is left alone.

    Lines that do not fit on a full disk are dropped.

    Raises:
        OSError: the file cannot be opened.
    """
    if path.is_symlink():
        path.unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    stream = os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8")
    handler = _Quiet(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger()
    logger.addHandler(handler)
    write_early_records(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
        with suppress(OSError):
            stream.close()


class _Quiet(logging.StreamHandler):
    """Handler that does not report lines which it cannot write."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Drop the line; a full disk is reported by the stage that meets it."""


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _is_within(path: Path, folder: Path) -> bool:
    return path == folder or folder in path.parents


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return path.absolute()
