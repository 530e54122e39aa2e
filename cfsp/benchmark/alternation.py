"""Timing in alternation, so that a change in the speed of the machine affects all compared calls equally."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median


def time_call(call: Callable[[], object], cuda: bool) -> float:
    """Return the wall-clock seconds of ``call``, including the work that it starts on the device.

    Args:
        call: function to time.
        cuda: wait for the GPU before and after the call.
    """
    import torch

    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_in_alternation(calls: Mapping[str, Callable[[], object]], repeats: int, cuda: bool) -> dict[str, list[float]]:
    """Time ``calls`` in turn. Every second repeat uses the opposite order.

    Args:
        calls: name -> function to time.
        repeats: number of repeats.
        cuda: wait for the GPU before and after each call.

    Returns:
        Name -> seconds of each repeat.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats):
        for name in list(calls) if repeat % 2 == 0 else reversed(list(calls)):
            seconds[name].append(time_call(calls[name], cuda))
    return seconds


def paired_ratios(ours: list[float], theirs: list[float]) -> tuple[float, list[float]]:
    """Return the median of the ratios ours / theirs, and the ratio of each pair of repeats."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return median(ratios), ratios
