"""Execution of a command in a separate process whose resident memory is polled."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Seconds between two polls of a process.
INTERVAL = 0.05


@dataclass(frozen=True)
class FinishedProcess:
    """A process that has ended.

    Attributes:
        code: exit code.
        seconds: wall-clock seconds.
        peak_bytes: highest polled VmHWM (peak resident memory) in bytes; None without /proc.
        out: standard output.
        err: standard error.
    """

    code: int
    seconds: float
    peak_bytes: int | None
    out: str
    err: str


def run_watched(
    command_line: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> FinishedProcess:
    """Run ``command_line`` to its end and poll its memory. Its output goes to files beside ``log``.

    The kernel keeps the high-water mark of a process, but the process may reset it, as cfsp does for each stage.
    Therefore the highest polled value counts. A peak between the last poll and a reset is missed here, but it is in
    record.json.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    out, err = log.with_suffix(".out"), log.with_suffix(".err")
    peak: int | None = None
    with out.open("w") as out_stream, err.open("w") as err_stream:
        start = time.perf_counter()
        process = subprocess.Popen(
            list(command_line),
            stdout=out_stream,
            stderr=err_stream,
            env=None if environment is None else dict(environment),
        )
        try:
            while process.poll() is None:
                high = peak_resident_bytes(process.pid)
                peak = high if peak is None else max(peak, high or 0)
                time.sleep(INTERVAL)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - start
    return FinishedProcess(process.returncode, seconds, peak, out.read_text(), err.read_text())


def peak_resident_bytes(pid: int | str) -> int | None:
    """Return VmHWM of a process in bytes; None if it cannot be read (the process has ended, or there is no /proc)."""
    return _memory_status(pid, "VmHWM")


def resident_bytes(pid: int | str) -> int | None:
    """Return VmRSS of a process in bytes; None if it cannot be read."""
    return _memory_status(pid, "VmRSS")


def _memory_status(pid: int | str, name: str) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)
