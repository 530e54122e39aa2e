"""What the folder of a run says of it, read without anything that computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cfsp.errors import CheckpointError
from cfsp.record.run_record import UNFINISHED, RunRecord


@dataclass(frozen=True)
class State:
    """``name``: done, running, failed, interrupted or missing; ``reason`` says more where there is more to say."""

    name: str
    reason: str = ""


def state_in(out: Path) -> State:
    """Read the state of a run that has no record of a success in the records' folder off its own folder."""
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
    said = record.error or {}
    ways = {UNFINISHED["type"]: "killed", "KeyboardInterrupt": "stopped"}
    if said.get("type") in ways:
        return State("interrupted", f"it was {ways[said['type']]}; the next launch goes on with it")
    return State("failed", error_of(record))


def error_of(record: RunRecord) -> str:
    """The type and message of a failed run's error, in one line."""
    said = record.error or {}
    return f"{said.get('type')}: {' '.join(str(said.get('message', '')).split())}"
