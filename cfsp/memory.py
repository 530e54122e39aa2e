"""How much memory this process may still take, on the machine or in its container."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available(device: torch.device) -> int:
    """Bytes free on ``device``; of the CPU, what the machine and the process's control group leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [_machine()]
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is not None and used is not None:
        # What files occupy is given back on demand.
        free.append(limit - used + _reclaimable())
    return max(0, min(free))


def return_freed() -> None:
    """Have glibc give freed memory back to the system, of which it keeps pieces up to 32 MiB.

    Else the tensors of one block, freed one by one, leave holes that those of the next do not fit into, and a process
    that holds two blocks grows to many.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _machine() -> int:
    if _MEMINFO.is_file():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    import psutil  # of accelerate's requirements

    return int(psutil.virtual_memory().available)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None


def _reclaimable() -> int:
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    found = dict(line.split() for line in lines)
    return int(found.get("inactive_file", 0)) + int(found.get("active_file", 0))
