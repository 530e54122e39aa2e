"""Figures of a run from its record: measurements, plan, recovery, and time and memory of the stages."""

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
from cfsp.tables.metrics import (
    Metric,
    count_metric,
    describe_metric,
    gap_metric,
    memory_metric,
    seconds_metric,
    share_metric,
)
from cfsp.tables.table import Column, FigureKey

#: Names of the stages that prune.
PRUNING_STAGES = ("calibrate", "plan", "apply")
_REMOVED = Column(share_metric("removed"), (("plan", "achieved", "ratio"),))
_TRAINED = Column(count_metric("trained parameters"), (("recovery", "trainable_parameters", "count"),))
PRUNING_TIME = Column(seconds_metric("pruning, s"), (("stages", "pruning", "seconds"),))
PEAK_MEMORY = Column(memory_metric("pruning, peak memory"), (("stages", "pruning", "peak_bytes"),))
#: Columns that do not come from an evaluation: the removed share of the scope's parameters, the number of parameters
#: that a recovery trains, the seconds of calibration, plan and slicing, and the peak memory of these stages.
RUN_COLUMNS = {"removed": _REMOVED, "trained": _TRAINED, "pruning_time": PRUNING_TIME, "peak_memory": PEAK_MEMORY}


def select_column(name: str, spec: MetricSpec, runs: Sequence[RecordedRun]) -> Column:
    """Return the single column of a metric.

    Args:
        name: name of the table or figure, for messages.
        spec: the metric.
        runs: runs whose records have the metric.

    Raises:
        ConfigError: the metric matches no figure of the runs, or several.
    """
    columns = list(select_columns(name, spec, runs))
    if len(columns) != 1:
        raise ConfigError(f"{name}: metric {spec} is {len(columns)} figures; one is needed here")
    return columns[0]


def select_columns(name: str, spec: MetricSpec, runs: Sequence[RecordedRun]) -> Iterator[Column]:
    """Yield the columns of a metric of a layout.

    Args:
        name: name of the table or figure, for messages.
        spec: the metric; a pattern may match several figures.
        runs: runs whose records have the metric.

    Raises:
        ConfigError: the metric matches no figure of the runs.
    """
    if isinstance(spec, str) and spec in RUN_COLUMNS:
        yield RUN_COLUMNS[spec]
        return
    pattern = spec if isinstance(spec, str) else spec.mean if isinstance(spec, MeanOf) else spec.gap
    columns = {key: None for run in runs for key in measurements_by_key(run.record, result_side(run.record))}
    members = [key for key in columns if any(fnmatchcase("/".join(key), part.strip()) for part in pattern.split("|"))]
    if not members:
        have = ", ".join("/".join(key) for key in columns)
        raise ConfigError(f"{name}: metrics={pattern}: no record has such a figure; there are {have}")
    if isinstance(spec, MeanOf):
        first = describe_metric(*members[0])
        yield Column(Metric(spec.label, first.better, first.format_value, first.unit), tuple(members))
    elif isinstance(spec, GapOf):
        yield from (
            Column(gap_metric(spec.label or f"gap, {describe_metric(*key).label}"), (key,), gap=True) for key in members
        )
    else:
        yield from (Column(describe_metric(*key), (key,)) for key in members)


def column_value(record: RunRecord, column: Column, side: str | None = None) -> float | None:
    """Return the value of a column for one run; None if a member of the column is missing.

    Args:
        record: record of the run.
        column: the column.
        side: side of the figure; None: the side that the run ended with.
    """
    if column.members == _REMOVED.members:
        return record.plan["achieved"]["ratio"] if record.plan and side != "dense" else 0.0
    if column.members == _TRAINED.members:
        return (record.recovery or {}).get("trainable_parameters") if side is None else None
    if column.members == PRUNING_TIME.members:
        return pruning_seconds(record) if side is None else None
    if column.members == PEAK_MEMORY.members:
        return _peak_pruning_bytes(record) if side is None else None
    if column.gap:
        without_gap = replace(column, gap=False)
        dense, own = column_value(record, without_gap, "dense"), column_value(record, without_gap, side)
        return log(own) - log(dense) if dense and own and min(dense, own) > 0 else None
    rows = measurements_by_key(record, side or result_side(record))
    values = [rows[key]["value"] for key in column.members if key in rows]
    return mean(values) if len(values) == len(column.members) else None


def pruning_seconds(record: RunRecord) -> float | None:
    """Return the seconds of calibration, plan and slicing with empty caches; None if the record does not state them."""
    stages = [stage for stage in record.stages if stage["name"] in PRUNING_STAGES]
    saved = [stage.get("saved_seconds", None if stage["cached"] else 0.0) for stage in stages]
    known = [cost for cost in saved if cost is not None]
    if not stages or len(known) < len(saved):
        return None
    return sum(stage["seconds"] for stage in stages) + sum(known)


def _peak_pruning_bytes(record: RunRecord) -> float | None:
    """Return the peak memory of pruning in bytes; None if a stage has no peak. The GPUs count if there are any."""
    stages = [stage for stage in record.stages if stage["name"] in PRUNING_STAGES]
    peaks = [stage.get("peak_gpu_bytes") or stage.get("peak_bytes") for stage in stages]
    known = [peak for peak in peaks if peak]
    return max(known) if known and len(known) == len(peaks) else None


def result_side(record: RunRecord) -> str:
    """Return the side with which the run ended: recovered, pruned or dense."""
    return next((side for side in ("recovered", "pruned") if record.measurements.get(side)), "dense")


def measurements_by_key(record: RunRecord, side: str) -> dict[FigureKey, Mapping[str, Any]]:
    """Return (suite, task, metric) -> measurement for one side."""
    return {(row["suite"], row["task"], row["metric"]): row for row in record.measurements.get(side, ())}
