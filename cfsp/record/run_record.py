"""Record of a run (record.json), written whether the run ended well or not."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cfsp.errors import CheckpointError
from cfsp.record.schema1 import upgrade_schema1
from cfsp.record.validation import find_record_problem
from cfsp.system.atomic import write_text
from cfsp.system.reading import read_json

SCHEMA = 2
#: Size of the largest record that is read; the largest of 1,148 committed records has 0.1 MB.
_LARGEST = 50_000_000
#: Error of a record until its run ends, which stays where the run was killed.
UNFINISHED = {"type": "Unfinished", "message": "the run has not ended: it is still going on, or it was killed"}


@dataclass
class RunRecord:
    """Record of a run.

    Attributes:
        run_id: id of the run: hash of the contents and settings that decide its figures.
        status: success or failed.
        configuration: composed configuration.
        identity: facts from which the run id is made.
        method: pruner and its settings.
        environment: commit, packages and hardware.
        model: the base model.
        calibration: the calibration set; None where none was used.
        plan: requested and achieved sparsity; None where nothing was pruned.
        blocks: sizes and distances of each block.
        stages: seconds and peak memory of each stage.
        measurements: side -> figures. Sides: dense; selected, the pruned model before compensation (where asked for);
            pruned; recovered.
        recovery: the recovery; None where there was none.
        checkpoint: the model folder and its export; None where none was saved.
        files: path within OUT -> {bytes, sha256} of plan, model folders and export; None in records of earlier
            versions.
        started: time at which the run began.
        finished: time at which the run ended.
        error: type and message of the error; None after a success.
        schema: version of this layout.
    """

    run_id: str
    status: str = "failed"
    configuration: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    blocks: list[dict[str, Any]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    measurements: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    recovery: dict[str, Any] | None = None
    checkpoint: dict[str, Any] | None = None
    files: dict[str, dict[str, Any]] | None = None
    started: str = ""
    finished: str = ""
    error: dict[str, str] | None = field(default_factory=lambda: dict(UNFINISHED))
    schema: int = SCHEMA

    def write(self, path: Path) -> None:
        """Write the record atomically: a reader sees the whole record or none."""
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @property
    def succeeded(self) -> bool:
        """Return whether the run was a success and its record is whole."""
        return self.status == "success" and self.problem() is None

    def problem(self) -> str | None:
        """Return what the record of a success lacks that every reader of records needs; None where it is whole."""
        return find_record_problem(self) if self.status == "success" else None

    @staticmethod
    def read(path: Path) -> RunRecord | None:
        """Return the record at ``path``; None where there is none.

        Raises:
            CheckpointError: the file is not a record of this schema.
        """
        if not os.path.lexists(path):
            return None
        try:
            values = read_json(path, str(path), limit=_LARGEST)
            if not isinstance(values, dict):
                raise ValueError("it is not an object")
            if values.get("schema") == 1:
                values = upgrade_schema1(values)
            if values.get("schema") != SCHEMA:
                raise ValueError(f"schema {str(values.get('schema'))[:40]}, this version reads {SCHEMA}")
            record = RunRecord(**values)
            if record.status != "success" and not isinstance(record.error, dict | None):
                raise ValueError("error is not an object")
            return record
        except CheckpointError as error:
            reason = str(error).removeprefix(f"{path}: ")
        except (ValueError, TypeError) as error:
            reason = str(error)
        raise CheckpointError(f"{path}: not a run record ({reason[:200]}); remove it or use another folder")
