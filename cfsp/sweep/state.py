"""State of a run, read off its folder without importing anything that computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cfsp.errors import CheckpointError
from cfsp.record.run_record import UNFINISHED, RunRecord


@dataclass(frozen=True)
class State:
    """State of a run.

    Attributes:
        name: done, running, failed, interrupted or missing.
        reason: why it is in that state, where there is more to say.
    """

    name: str
    reason: str = ""


def state_in(out: Path) -> State:
    """Return the state of a run without a record of a success in the records' folder, read off its own folder."""
    from cfsp.pipeline.run import LEASE
    from cfsp.system.lease import holder

    try:
        record = RunRecord.read(out / "record.json")
    except CheckpointError as error:
        return State("failed", str(error))
    who = holder(out / LEASE)
    if who is not None:
        return State("running", who)
    if record is None or record.status == "success":  # or one of its files is gone
        return State("missing")
    ways = {UNFINISHED["type"]: "killed", "KeyboardInterrupt": "stopped"}
    kind = (record.error or {}).get("type")
    if kind in ways:
        return State("interrupted", f"it was {ways[kind]}; the next launch goes on with it")
    return State("failed", error_of(record))


def error_of(record: RunRecord) -> str:
    """Return the type and message of a failed run's error, in one line."""
    error = record.error or {}
    return f"{error.get('type')}: {' '.join(str(error.get('message', '')).split())}"
