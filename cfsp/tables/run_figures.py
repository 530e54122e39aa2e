"""Figures of a run: what was measured, what the plan and the recovery say, and what the stages cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import log
from statistics import mean
from typing import Any

from cfsp.errors import ConfigError
from cfsp.record.run_record import RunRecord
from cfsp.tables.collection import RecordedRun
from cfsp.tables.layout import GapOf, MeanOf, MetricSpec
from cfsp.tables.metrics import Metric, count, describe, gap, memory, seconds, share
from cfsp.tables.table import Column, FigureKey

#: The stages that prune.
PRUNING = ("calibrate", "plan", "apply")
_REMOVED = Column(share("removed"), (("plan", "achieved", "ratio"),))
_TRAINED = Column(count("trained parameters"), (("recovery", "trainable_parameters", "count"),))
PRUNING_TIME = Column(seconds("pruning, s"), (("stages", "pruning", "seconds"),))
PEAK_MEMORY = Column(memory("pruning, peak memory"), (("stages", "pruning", "peak_bytes"),))
#: Columns that are no measurement: the removed share of the scope's parameters, the parameters that a recovery trains,
#: the seconds of calibration, plan and slicing, and the most memory that the process had in them.
OF_THE_RUN = {"removed": _REMOVED, "trained": _TRAINED, "pruning_time": PRUNING_TIME, "peak_memory": PEAK_MEMORY}


def column_of(name: str, spec: MetricSpec, runs: Sequence[RecordedRun]) -> Column:
    """Return the column of a metric.

    Raises:
        ConfigError: the metric is no figure of the runs, or several.
    """
    columns = list(columns_of(name, spec, runs))
    if len(columns) != 1:
        raise ConfigError(f"{name}: metric {spec} is {len(columns)} figures; one is needed here")
    return columns[0]


def columns_of(name: str, spec: MetricSpec, runs: Sequence[RecordedRun]) -> Iterator[Column]:
    """Yield the columns that a metric of a layout stands for.

    Raises:
        ConfigError: no record has such a figure.
    """
    if isinstance(spec, str) and spec in OF_THE_RUN:
        yield OF_THE_RUN[spec]
        return
    pattern = spec if isinstance(spec, str) else spec.mean if isinstance(spec, MeanOf) else spec.gap
    columns = {key: None for run in runs for key in figures_of(run.record, result_side(run.record))}
    members = [key for key in columns if any(fnmatchcase("/".join(key), part.strip()) for part in pattern.split("|"))]
    if not members:
        have = ", ".join("/".join(key) for key in columns)
        raise ConfigError(f"{name}: metrics={pattern}: no record has such a figure; there are {have}")
    if isinstance(spec, MeanOf):
        first = describe(*members[0])
        yield Column(Metric(spec.label, first.better, first.show, first.unit), tuple(members))
    elif isinstance(spec, GapOf):
        yield from (Column(gap(spec.label or f"gap, {describe(*key).label}"), (key,), gap=True) for key in members)
    else:
        yield from (Column(describe(*key), (key,)) for key in members)


def value_of(record: RunRecord, column: Column, side: str | None = None) -> float | None:
    """Return the figure of a run's result, or of ``side``; None where it, or one of its members, is missing."""
    if column.members == _REMOVED.members:
        return record.plan["achieved"]["ratio"] if record.plan and side != "dense" else 0.0
    if column.members == _TRAINED.members:
        return (record.recovery or {}).get("trainable_parameters") if side is None else None
    if column.members == PRUNING_TIME.members:
        return pruning_seconds(record) if side is None else None
    if column.members == PEAK_MEMORY.members:
        return _pruning_peak(record) if side is None else None
    if column.gap:
        without_gap = replace(column, gap=False)
        dense, own = value_of(record, without_gap, "dense"), value_of(record, without_gap, side)
        return log(own) - log(dense) if dense and own and min(dense, own) > 0 else None
    rows = figures_of(record, side or result_side(record))
    values = [rows[key]["value"] for key in column.members if key in rows]
    return mean(values) if len(values) == len(column.members) else None


def pruning_seconds(record: RunRecord) -> float | None:
    """Return the seconds of calibration, plan and slicing with empty caches; None where they are not known."""
    stages = [stage for stage in record.stages if stage["name"] in PRUNING]
    saved = [stage.get("saved_seconds", None if stage["cached"] else 0.0) for stage in stages]
    known = [cost for cost in saved if cost is not None]
    if not stages or len(known) < len(saved):
        return None
    return sum(stage["seconds"] for stage in stages) + sum(known)


def _pruning_peak(record: RunRecord) -> float | None:
    """Return the peak memory of pruning in bytes, on the GPUs where there are any; None where a stage lacks it."""
    stages = [stage for stage in record.stages if stage["name"] in PRUNING]
    peaks = [stage.get("peak_gpu_bytes") or stage.get("peak_bytes") for stage in stages]
    known = [peak for peak in peaks if peak]
    return max(known) if known and len(known) == len(peaks) else None


def result_side(record: RunRecord) -> str:
    """Return the side that the run ended with: recovered, pruned or dense."""
    return next((side for side in ("recovered", "pruned") if record.measurements.get(side)), "dense")


def figures_of(record: RunRecord, side: str) -> dict[FigureKey, Mapping[str, Any]]:
    """Return the measurements of one side by suite, task and metric."""
    return {(row["suite"], row["task"], row["metric"]): row for row in record.measurements.get(side, ())}
