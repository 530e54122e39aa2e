"""Running a command in a process of its own and watching its resident memory."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Seconds between two looks at a process.
INTERVAL = 0.05


@dataclass(frozen=True)
class Ended:
    """A process that is over.

    Attributes:
        code: exit code.
        seconds: wall-clock seconds.
        peak_bytes: highest resident memory seen (VmHWM); None without /proc.
        out: standard output.
        err: standard error.
    """

    code: int
    seconds: float
    peak_bytes: int | None
    out: str
    err: str


def watched(command_line: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Ended:
    """Run ``command_line`` to the end, its output in files beside ``log``, its memory watched.

    The kernel keeps the high-water mark of a process, but the process may reset it (cfsp does so for each stage).
    Therefore the highest of all looks counts. A peak between a reset and the next look is in record.json.
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
                high = high_water(process.pid)
                peak = high if peak is None else max(peak, high or 0)
                time.sleep(INTERVAL)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - start
    return Ended(process.returncode, seconds, peak, out.read_text(), err.read_text())


def high_water(pid: int | str) -> int | None:
    """Return VmHWM of a process in bytes; None where it cannot be read (it is over, or there is no /proc)."""
    return _status(pid, "VmHWM")


def resident(pid: int | str) -> int | None:
    """Return VmRSS of a process in bytes; None where it cannot be read."""
    return _status(pid, "VmRSS")


def _status(pid: int | str, name: str) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)
