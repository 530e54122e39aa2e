"""Ownership of OUT: it must belong to this run before anything in it is replaced."""

from __future__ import annotations

import json
import os
from pathlib import Path

from cfsp.config.run_config import RunConfig
from cfsp.errors import CheckpointError, ConfigError
from cfsp.plan.history import MARKER, is_written_by_cfsp
from cfsp.record.run_record import RunRecord
from cfsp.record.written import MODEL_FOLDERS, within
from cfsp.system.atomic import write_text


def check_owner(out: Path, run_id: str, *, force: bool = False) -> None:
    """Create OUT, or check that it belongs to this run.

    Args:
        out: the folder OUT.
        run_id: id of this run.
        force: rename an unreadable record instead of refusing it.

    Raises:
        CheckpointError: the folder cannot be written, or its record cannot be read.
        ConfigError: the folder holds another run.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe_file = out / f".write-test-{os.getpid()}"
        probe_file.touch()
        probe_file.unlink()
    except OSError as error:
        raise CheckpointError(
            f"paths.output_dir={out}: cannot be written ({error.strerror}); give another folder"
        ) from error
    try:
        earlier = RunRecord.read(out / "record.json")
    except CheckpointError:
        if not force:
            raise
        os.replace(out / "record.json", out / "record.unreadable.json")
        earlier = None
    if earlier is not None and earlier.run_id != run_id:
        raise ConfigError(
            f"paths.output_dir={out}: holds another run ({earlier.run_id}; this one is {run_id}); give another folder "
            "or remove it"
        )


def is_copied(copy: Path) -> bool:
    """Return whether the copy of the record exists, is readable, and states success."""
    try:
        record = RunRecord.read(copy)
    except CheckpointError:
        return False
    return record is not None and record.succeeded


def saves_pruned_model(config: RunConfig) -> bool:
    """Return whether the run saves a pruned model."""
    return bool(config.save.model and config.pruner.instance.prunes)


def restore_model_markers(out: Path) -> None:
    """Restore the missing or damaged marker of this run's damaged model folders, so that saving may replace them."""
    earlier = RunRecord.read(out / "record.json")
    for name in MODEL_FOLDERS[:2]:
        folder, listed = out / name, within(None if earlier is None else earlier.files, [name])
        if f"{name}/{MARKER}" not in listed or not folder.is_dir() or is_written_by_cfsp(folder):
            continue
        files = [path for path in folder.rglob("*") if not path.is_dir()]
        if all(
            path.relative_to(out).as_posix() in listed for path in files
        ):  # the folder holds no file of another origin
            write_text(folder / MARKER, json.dumps({"schema": 1, "state": "damaged"}) + "\n")
