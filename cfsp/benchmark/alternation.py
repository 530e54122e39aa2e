"""Timing things beside each other, so that a machine that drifts favours none of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median


def seconds_of(call: Callable[[], object], cuda: bool) -> float:
    """Wall-clock seconds until what ``call`` started is over on the device too."""
    import torch

    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternated(calls: Mapping[str, Callable[[], object]], repeats: int, cuda: bool) -> dict[str, list[float]]:
    """Name -> seconds of each repeat; every other repeat goes through ``calls`` in the opposite order."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats):
        for name in list(calls) if repeat % 2 == 0 else reversed(list(calls)):
            found[name].append(seconds_of(calls[name], cuda))
    return found


def pairwise(ours: list[float], theirs: list[float]) -> tuple[float, list[float]]:
    """Median and all of the ratios ours / theirs, one of each repeat."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return median(ratios), ratios
