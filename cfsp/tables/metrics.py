"""Names, units, order and direction of every figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cfsp.evaluation.measurement import LACKS_BOS, TRUNCATED

#: Mark -> its meaning.
NOTES = {"†": LACKS_BOS, "‡": TRUNCATED}


@dataclass(frozen=True)
class Metric:
    """Presentation of a figure.

    Attributes:
        label: its name.
        better: +1 where higher is better, -1 where lower is better, 0 for neither.
        show: writes a value as text.
        unit: unit of the value.
    """

    label: str
    better: int
    show: Callable[[float], str]
    unit: str = ""

    def deviation(self, difference: float) -> str:
        """Write a difference of two values with its sign; differences of fractions are in percentage points."""
        return f"{100 * difference:+.2f} pp" if self.unit == "fraction" else f"{difference:+.2f}"


def _count(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def _bytes(value: float) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


_COST = {
    "parameters": Metric("parameters", -1, _count, "count"),
    "checkpoint": Metric("checkpoint size", -1, _bytes, "bytes"),
    "linear_macs": Metric("MACs per token (linear layers)", -1, _count, "MACs per token"),
    "prefill": Metric("prefill, tokens/s", 1, lambda value: f"{value:,.0f}", "tokens/s"),
    "decode": Metric("decode, tokens/s", 1, lambda value: f"{value:,.1f}", "tokens/s"),
    "memory": Metric("peak memory", -1, _bytes, "bytes"),
}
_SUITES = ("cost-size", "perplexity", "zero_shot", "cost-speed")


def describe(suite: str, task: str, metric: str) -> Metric:
    """Return the presentation of a figure. Unknown figures are shown as they are, and higher is taken as better."""
    if suite == "cost" and task in _COST:
        return _COST[task]
    if suite == "perplexity":
        return Metric(f"perplexity, {task}", -1, lambda value: f"{value:,.2f}")
    if suite == "zero_shot":
        return Metric(f"{task}, {metric}", 1, lambda value: f"{value:.3f}", "fraction")
    return Metric(f"{task}, {metric}", 1, lambda value: f"{value:.4g}")


def share(label: str) -> Metric:
    """Return the presentation of a share that is neither good nor bad, such as the removed share of the parameters."""
    return Metric(label, 0, lambda value: f"{value:.1%}", "fraction")


def seconds(label: str) -> Metric:
    """Return the presentation of wall-clock seconds."""
    return Metric(label, -1, lambda value: f"{value:.1f}" if value < 100 else f"{value:,.0f}", "s")


def memory(label: str) -> Metric:
    """Return the presentation of memory in bytes."""
    return Metric(label, -1, _bytes, "bytes")


def gap(label: str) -> Metric:
    """Return the presentation of a difference of logarithms to the dense model."""
    return Metric(label, -1, lambda value: f"{value:.3f}", "nats per token")


def count(label: str) -> Metric:
    """Return the presentation of a whole number that is neither good nor bad."""
    return Metric(label, 0, lambda value: f"{value:,.0f}", "count")


def notes_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the marks of what limits a measurement. Records from before these were kept have none."""
    detail = row.get("detail") or {}
    states = {"†": detail.get("lacks_bos"), "‡": detail.get("truncated")}
    return tuple(mark for mark, state in states.items() if state)


def order(suite: str, task: str) -> int:
    """Return the place of a figure among rows: size, perplexity, tasks, speed, others."""
    if suite == "cost":
        return _SUITES.index("cost-speed" if task in ("prefill", "decode", "memory") else "cost-size")
    return _SUITES.index(suite) if suite in _SUITES else len(_SUITES)
