"""Presentation of figures: name, unit, order, and whether higher is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cfsp.evaluation.measurement import LACKS_BOS, TRUNCATED

#: Mark beside a figure -> sentence that explains it.
NOTES = {"†": LACKS_BOS, "‡": TRUNCATED}


@dataclass(frozen=True)
class Metric:
    """Presentation of a figure.

    Attributes:
        label: name of the figure.
        better: +1 if higher is better, -1 if lower is better, 0 for neither.
        format_value: function that formats a value as text.
        unit: unit of the value.
    """

    label: str
    better: int
    format_value: Callable[[float], str]
    unit: str = ""

    def deviation(self, difference: float) -> str:
        """Format a difference of two values with its sign. Differences of fractions are in percentage points."""
        return f"{100 * difference:+.2f} pp" if self.unit == "fraction" else f"{difference:+.2f}"


def _format_count(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def _format_bytes(value: float) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


_COST = {
    "parameters": Metric("parameters", -1, _format_count, "count"),
    "checkpoint": Metric("checkpoint size", -1, _format_bytes, "bytes"),
    "linear_macs": Metric("MACs per token (linear layers)", -1, _format_count, "MACs per token"),
    "prefill": Metric("prefill, tokens/s", 1, lambda value: f"{value:,.0f}", "tokens/s"),
    "decode": Metric("decode, tokens/s", 1, lambda value: f"{value:,.1f}", "tokens/s"),
    "memory": Metric("peak memory", -1, _format_bytes, "bytes"),
}
_SUITES = ("cost-size", "perplexity", "zero_shot", "cost-speed")


def describe_metric(suite: str, task: str, metric: str) -> Metric:
    """Return the presentation of a figure. Unknown figures get a default one in which higher is better."""
    if suite == "cost" and task in _COST:
        return _COST[task]
    if suite == "perplexity":
        return Metric(f"perplexity, {task}", -1, lambda value: f"{value:,.2f}")
    if suite == "zero_shot":
        return Metric(f"{task}, {metric}", 1, lambda value: f"{value:.3f}", "fraction")
    return Metric(f"{task}, {metric}", 1, lambda value: f"{value:.4g}")


def share_metric(label: str) -> Metric:
    """Return the presentation of a share that is neither good nor bad, such as the removed share of the parameters."""
    return Metric(label, 0, lambda value: f"{value:.1%}", "fraction")


def seconds_metric(label: str) -> Metric:
    """Return the presentation of wall-clock seconds."""
    return Metric(label, -1, lambda value: f"{value:.1f}" if value < 100 else f"{value:,.0f}", "s")


def memory_metric(label: str) -> Metric:
    """Return the presentation of memory in bytes."""
    return Metric(label, -1, _format_bytes, "bytes")


def gap_metric(label: str) -> Metric:
    """Return the presentation of a difference of logarithms to the dense model."""
    return Metric(label, -1, lambda value: f"{value:.3f}", "nats per token")


def count_metric(label: str) -> Metric:
    """Return the presentation of a whole number that is neither good nor bad."""
    return Metric(label, 0, lambda value: f"{value:,.0f}", "count")


def note_marks(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the marks of a measurement's limitations. Old records do not state them and have no marks."""
    detail = row.get("detail") or {}
    states = {"†": detail.get("lacks_bos"), "‡": detail.get("truncated")}
    return tuple(mark for mark, state in states.items() if state)


def suite_order(suite: str, task: str) -> int:
    """Return the sort key of a figure: size, perplexity, tasks, speed, then others."""
    if suite == "cost":
        return _SUITES.index("cost-speed" if task in ("prefill", "decode", "memory") else "cost-size")
    return _SUITES.index(suite) if suite in _SUITES else len(_SUITES)
