"""Seconds and peak memory of each stage of a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cfsp.system.progress import working

log = logging.getLogger(__name__)


class Stages:
    """Recorder of stages.

    Each entry has name, seconds, peak_bytes, peak_gpu_bytes and cached. ``peak_gpu_bytes`` sums over all GPUs of the
    machine, and only this process counts. A stage that prunes also has ``saved_seconds``, the time that the results
    read from the cache had taken to compute.

    Args:
        after: called when a stage has ended well.

    Example:
        >>> stages = Stages()
        >>> with stages("calibrate") as stage:
        ...     stage["cached"] = True
    """

    def __init__(self, after: Callable[[], None] = lambda: None) -> None:

        self.entries: list[dict[str, Any]] = []
        self._after = after

    @contextmanager
    def __call__(self, name: str) -> Iterator[dict[str, Any]]:
        """Measure what runs inside as the stage ``name``; yields its entry."""
        entry: dict[str, Any] = {"name": name, "cached": False}
        log.info("%s ...", name)
        _reset_peak()
        start = time.perf_counter()
        try:
            with working(name):
                yield entry
        finally:
            entry["seconds"] = time.perf_counter() - start
            entry |= _peak()
            self.entries.append(entry)
            log.info("%s: %.1f s%s", name, entry["seconds"], " (cached)" if entry["cached"] else "")
        self._after()


def _reset_peak() -> None:
    import torch

    for device in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with open("/proc/self/clear_refs", "w") as stream:  # Linux: resets the resident set's high-water mark
            stream.write("5")
    except OSError:
        pass


def _peak() -> dict[str, int | None]:
    import torch

    gpu = None
    if torch.cuda.is_available():
        gpu = sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    resident = None
    try:
        with open("/proc/self/status", encoding="utf-8") as stream:
            resident = next(int(line.split()[1]) * 1024 for line in stream if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_bytes": resident, "peak_gpu_bytes": gpu}
