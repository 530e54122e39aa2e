"""State of a run, read from its folder; the module imports nothing that computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cfsp.errors import CheckpointError
from cfsp.record.run_record import UNFINISHED, RunRecord
from cfsp.system.lease import holder


@dataclass(frozen=True)
class State:
    """State of a run.

    Attributes:
        name: done, running, failed, interrupted or missing.
        reason: explanation of the state; empty if the name says everything.
    """

    name: str
    reason: str = ""


def folder_state(out: Path) -> State:
    """Return the state of an unfinished run, read from its folder OUT.

    Args:
        out: folder OUT of a run that has no record of success in the records' folder.
    """
    # Start-up time: loads numpy, safetensors, torch.
    from cfsp.pipeline.run import LEASE

    try:
        record = RunRecord.read(out / "record.json")
    except CheckpointError as error:
        return State("failed", str(error))
    owner = holder(out / LEASE)
    if owner is not None:
        return State("running", owner)
    if record is None or record.status == "success":  # in the second case a file of the run is missing
        return State("missing")
    interruptions = {UNFINISHED["type"]: "killed", "KeyboardInterrupt": "stopped"}
    kind = (record.error or {}).get("type")
    if kind in interruptions:
        return State("interrupted", f"it was {interruptions[kind]}; the next launch goes on with it")
    return State("failed", error_line(record))


def error_line(record: RunRecord) -> str:
    """Return the type and the message of a failed run's error on one line."""
    error = record.error or {}
    return f"{error.get('type')}: {' '.join(str(error.get('message', '')).split())}"
