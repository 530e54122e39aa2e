"""record.json: the truth about a run, written whether it ended well or not."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cfsp.errors import CheckpointError
from cfsp.system.atomic import write_text

SCHEMA = 1
#: What a record says until its run ends, and for ever where the run was killed.
UNFINISHED = {"type": "Unfinished", "message": "the run has not ended: it is still going on, or it was killed"}


@dataclass
class RunRecord:
    """status: success or failed. ``measurements``: side -> figures; ``blocks``: per block.

    Sides: dense; selected: what stays, without its compensation (where asked for); pruned; recovered. ``files``: path
    within OUT -> {bytes, sha256} of plan, model folders and export; None in records of earlier versions.
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
        """Atomically: a reader sees the whole record or none."""
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @property
    def succeeded(self) -> bool:
        """Whether it is of a success, and whole."""
        return self.status == "success" and self.problem() is None

    def problem(self) -> str | None:
        """What a success lacks that everything which reads records counts on; None where it is whole."""
        if self.status != "success":
            return None
        needed = {
            "configuration": ("seed",), "identity": ("version",),
            "environment": ("git", "packages", "cpu", "cores", "gpus"),
            "model": ("fingerprint", "dtype"),
        }  # fmt: skip
        for name, keys in needed.items():
            value = getattr(self, name)
            lacking = [key for key in keys if not isinstance(value, dict) or key not in value]
            if lacking:
                return f"{name}.{lacking[0]} is missing"
        if not isinstance(self.measurements, dict) or not all(isinstance(v, list) for v in self.measurements.values()):
            return "measurements are no lists of figures"
        for row in (row for rows in self.measurements.values() for row in rows):
            problem = figure_problem(row)
            if problem is not None:
                return problem
        if not isinstance(self.stages, list) or not all(isinstance(s, dict) and "seconds" in s for s in self.stages):
            return "stages are no list of stages"
        plan = self.plan
        if plan is not None and not (isinstance(plan, dict) and "ratio" in (plan.get("achieved") or {})):
            return "plan.achieved.ratio is missing"
        return None

    @staticmethod
    def read(path: Path) -> RunRecord | None:
        """The record at ``path``; None where there is none.

        Raises:
            CheckpointError: a file that is not a record of this schema.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.get("schema") != SCHEMA:
                raise ValueError(f"schema {values.get('schema')!r}, this version reads {SCHEMA}")
            return RunRecord(**values)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: not a run record ({error}); remove it or use another folder") from error


def figure_problem(row: Any) -> str | None:
    """Return what a figure lacks that everything which reads figures counts on; None where it is whole."""
    if not isinstance(row, dict) or not {"suite", "task", "metric"} <= row.keys() or not _is_number(row.get("value")):
        return f"a figure without name or value: {row}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value  # NaN is none
