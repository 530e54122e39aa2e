"""Memory that this process may still allocate, within the limits of the machine and its container.

This is written by hand because psutil does not know the limits of control groups (containers, Slurm).
"""

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
#: Lists the control groups of this process, one line ``number:controllers:path`` for each hierarchy.
_MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class _Files:
    """Names of the memory files in one version of control groups.

    Attributes:
        limit: file with the bytes that the group may take.
        used: file with the bytes that it has taken.
        files: entries of memory.stat with the bytes that cached files occupy.
    """

    limit: str
    used: str
    files: tuple[str, ...]


_V2 = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def available(device: torch.device) -> int:
    """Return the free bytes of ``device``; for the CPU, the bytes that the machine and the control groups leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [_machine("MemAvailable")]
    for folder, files, limit in _limits():
        used = _number(folder / files.used)
        if used is not None:
            # The system frees the memory of cached files on demand.
            free.append(limit - used + _reclaimable(folder, files))
    return max(0, min(free))


def capacity(device: torch.device) -> int:
    """Return the total bytes of ``device``; for the CPU, the bytes that machine and control groups allow."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return min([_machine("MemTotal"), *(limit for _, _, limit in _limits())])


def return_freed() -> None:
    """Make glibc return freed memory to the system; by default it keeps pieces of up to 32 MiB.

    Otherwise the tensors of one block, freed one by one, leave holes into which the tensors of the next block do not
    fit, and a process that holds two blocks grows to the size of many.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _limits() -> Iterator[tuple[Path, _Files, int]]:
    """Yield (folder, files, limit in bytes) of each limited control group: the process's own and all above it."""
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
        # In a container the path may be the machine's, and only its last folders, or none, are visible here.
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
    import psutil  # a requirement of accelerate; only needed where /proc does not exist

    memory = psutil.virtual_memory()
    return int(memory.total if name == "MemTotal" else memory.available)


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
    statistics = dict(line.split() for line in lines)
    return sum(int(statistics.get(name, 0)) for name in files.files)
