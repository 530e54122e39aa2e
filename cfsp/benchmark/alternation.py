"""Timing in alternation, so that a machine that drifts favours none of the things compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median


def seconds_of(call: Callable[[], object], cuda: bool) -> float:
    """Return the wall-clock seconds of ``call``, work that it starts on the device included."""
    import torch

    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternated(calls: Mapping[str, Callable[[], object]], repeats: int, cuda: bool) -> dict[str, list[float]]:
    """Time ``calls`` in turn; every other repeat goes through them in the opposite order.

    Returns:
        The seconds of each repeat, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats):
        for name in list(calls) if repeat % 2 == 0 else reversed(list(calls)):
            seconds[name].append(seconds_of(calls[name], cuda))
    return seconds


def pairwise(ours: list[float], theirs: list[float]) -> tuple[float, list[float]]:
    """Return the median of the ratios ours / theirs, and the ratio of each repeat."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return median(ratios), ratios
