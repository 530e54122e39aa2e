"""Whether OUT belongs to this run, and what may be replaced in it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from cfsp.config.run_config import RunConfig
from cfsp.errors import CheckpointError, ConfigError
from cfsp.plan.history import MARKER
from cfsp.record.run_record import RunRecord
from cfsp.record.written import MODEL_FOLDERS, within
from cfsp.system.atomic import write_text


def check_owner(out: Path, run_id: str, *, force: bool = False) -> None:
    """Make OUT, or find it ours; another run's folder is refused. ``force`` sets a record aside that cannot be read."""
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
    """Whether the record is there, whole and of a success."""
    try:
        found = RunRecord.read(copy)
    except CheckpointError:
        return False
    return found is not None and found.succeeded


def wants_model(config: RunConfig) -> bool:
    return bool(config.save.model and config.pruner.instance.prunes)


def allow_replacing(out: Path) -> None:
    """Give a damaged model folder of ours its marker back, without which it could not be replaced."""
    earlier = RunRecord.read(out / "record.json")
    for name in MODEL_FOLDERS[:2]:
        folder, listed = out / name, within(None if earlier is None else earlier.files, [name])
        if f"{name}/{MARKER}" not in listed or not folder.is_dir() or (folder / MARKER).exists():
            continue
        files = [path for path in folder.rglob("*") if not path.is_dir()]
        if all(path.relative_to(out).as_posix() in listed for path in files):  # nothing of anybody else's
            write_text(folder / MARKER, json.dumps({"schema": 1, "state": "damaged"}) + "\n")
