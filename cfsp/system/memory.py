"""How much memory this process may still take, on the machine or in its container."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
#: The control groups this process is in, a line ``number:controllers:path`` for each hierarchy.
_MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class _Files:
    """What a version of control groups calls the memory that a group may take and has taken, and what files occupy."""

    limit: str
    used: str
    files: tuple[str, ...]


_V2 = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def available(device: torch.device) -> int:
    """Bytes free on ``device``; of the CPU, what the machine and the process's control groups leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [_machine("MemAvailable")]
    for folder, files, limit in _limits():
        used = _number(folder / files.used)
        if used is not None:
            # What files occupy is given back on demand.
            free.append(limit - used + _reclaimable(folder, files))
    return max(0, min(free))


def capacity(device: torch.device) -> int:
    """Bytes that ``device`` has, taken or free; of the CPU, what machine and control groups let the process have."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return min([_machine("MemTotal"), *(limit for _, _, limit in _limits())])


def return_freed() -> None:
    """Have glibc give freed memory back to the system, of which it keeps pieces up to 32 MiB.

    Else the tensors of one block, freed one by one, leave holes that those of the next do not fit into, and a process
    that holds two blocks grows to many.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _limits() -> Iterator[tuple[Path, _Files, int]]:
    """The process's control groups that have a limit (the one it is in and all above it): folder, files, limit."""
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            root, files = _CGROUP, _V2
        elif "memory" in controllers.split(","):
            root, files = _CGROUP / "memory", _V1
        else:
            continue
        # In a container the path may be the machine's, of which only the last folders, or none, are to be seen here.
        group = root.joinpath(*(part for part in path.split("/") if part not in ("", "..")))
        for folder in (group, *group.parents):
            limit = _number(folder / files.limit)
            if limit is not None:
                yield folder, files, limit
            if folder == root:
                break


def _machine(name: Literal["MemTotal", "MemAvailable"]) -> int:
    if _MEMINFO.is_file():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    import psutil  # of accelerate's requirements

    found = psutil.virtual_memory()
    return int(found.total if name == "MemTotal" else found.available)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None


def _reclaimable(folder: Path, files: _Files) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    found = dict(line.split() for line in lines)
    return sum(int(found.get(name, 0)) for name in files.files)
