"""record.json: the truth about a run, written whether it ended well or not."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cfsp.errors import CheckpointError

SCHEMA = 1
#: What a record says until its run ends, and for ever where the run was killed.
UNFINISHED = {"type": "Unfinished", "message": "the run has not ended: it is still going on, or it was killed"}


@dataclass
class RunRecord:
    """status: success or failed. ``measurements``: side ("dense", "pruned", "recovered") -> figures;
    ``blocks``: per block."""

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
    started: str = ""
    finished: str = ""
    error: dict[str, str] | None = field(default_factory=lambda: dict(UNFINISHED))
    schema: int = SCHEMA

    def write(self, path: Path) -> None:
        """Atomically: a reader sees the whole record or none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)

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
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a run record ({error}); remove it or use another folder") from error
