"""A table as data: sections of rows with a figure per column; means over seeds; dense first; best and second best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import isfinite, log
from statistics import mean, stdev
from typing import Any

from cfsp.errors import ConfigError
from cfsp.record.run_record import RunRecord
from cfsp.sweep.experiment import Cell
from cfsp.tables.collection import Found
from cfsp.tables.layout import GapOf, MeanOf, MetricSpec, TableLayout
from cfsp.tables.metrics import NOTES, Metric, count, describe, gap, memory, notes_of, seconds, share
from cfsp.tables.reported import DENSE, Published, published, same_value

#: What two figures must agree in to stand in one column.
_SETTINGS = (
    "seq_len",
    "n",
    "split",
    "num_fewshot",
    "version",
    "limit",
    "unit",
    "task_hash",
    "bos",
    "device",
    "threads",
)
#: Of these, by suite, what follows from the model: tokens of a text and what bos=auto means for its tokenizer, the
#: longest window that the harness may use.
_OF_THE_MODEL = {"perplexity": ("n", "bos"), "zero_shot": ("seq_len",)}


class NothingToShowError(ConfigError):
    """None of the chosen runs is what a table or figure is about."""


#: Dense figures of one model may differ by this much, relatively: other processors sum in other orders.
DENSE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Column:
    """A figure by its name, or the mean of several (``members``).

    ``gap``: the logarithm of it less that of the dense model's.
    """

    metric: Metric
    members: tuple[tuple[str, str, str], ...]
    gap: bool = False


_REMOVED = Column(share("removed"), (("plan", "achieved", "ratio"),))
_TRAINED = Column(count("trained parameters"), (("recovery", "trainable_parameters", "count"),))
PRUNING_TIME = Column(seconds("pruning, s"), (("stages", "pruning", "seconds"),))
PEAK_MEMORY = Column(memory("pruning, peak memory"), (("stages", "pruning", "peak_bytes"),))
#: Metrics that are no measurement: the removed share of the scope's parameters, the parameters that a recovery trains,
#: the seconds of calibration, plan and slicing, and the most memory that the process had in them.
_OF_THE_RUN = {"removed": _REMOVED, "trained": _TRAINED, "pruning_time": PRUNING_TIME, "peak_memory": PEAK_MEMORY}
#: The stages that prune.
PRUNING = ("calibrate", "plan", "apply")


@dataclass
class Entry:
    """Values by seed. ``rank``: 1 the best of its section's column, 2 the second best, 0 others and the dense row.

    ``published``: somebody else's figure, measured in the same way. ``notes``: marks of what limits a figure here
    (:func:`cfsp.tables.metrics.notes_of`).
    """

    values: dict[int, float] = field(default_factory=dict)
    rank: int = 0
    published: Published | None = None
    notes: tuple[str, ...] = ()

    @property
    def mean(self) -> float | None:
        return mean(self.values.values()) if self.values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None of one, or where a perplexity is infinite."""
        several = len(self.values) > 1 and all(map(isfinite, self.values.values()))
        return stdev(self.values.values()) if several else None

    @property
    def deviation(self) -> float | None:
        """Ours less the published."""
        return None if self.mean is None or self.published is None else self.mean - self.published.value


@dataclass
class Row:
    label: str
    entries: list[Entry]
    run_ids: list[str]


@dataclass
class Table:
    name: str
    caption: str
    head: str
    columns: list[Column]
    sections: list[tuple[str, list[Row]]]
    records: list[RunRecord]
    #: Runs with a record, and runs that there should be.
    done: int
    wanted: int

    @property
    def seeds(self) -> int:
        """Of the row that has most."""
        return max(len(entry.values) for _, rows in self.sections for row in rows for entry in row.entries)

    @property
    def rows(self) -> list[Row]:
        return [row for _, rows in self.sections for row in rows]

    def is_published(self, at: int) -> bool:
        """Whether a figure of the column ``at`` has a published one beside it."""
        return any(row.entries[at].published for row in self.rows)

    @property
    def notes(self) -> list[str]:
        """Marks that stand at a figure, in the order of their meaning."""
        used = {mark for row in self.rows for entry in row.entries for mark in entry.notes}
        return [mark for mark in NOTES if mark in used]

    @property
    def sources(self) -> list[str]:
        """Of the published figures, in the order in which they appear."""
        return list(dict.fromkeys(e.published.source for row in self.rows for e in row.entries if e.published))


def table(
    name: str,
    layout: TableLayout,
    found: Sequence[Found],
    reported: Sequence[Published] = (),
    cells: Sequence[Cell] = (),
) -> Table:
    """Lay ``found`` out, with what is ``reported`` of the same beside it.

    ``cells``: all runs that there should be, in order; the rows of those without a record are empty.

    Raises:
        ConfigError: a metric that no record has; records in one table that differ in more than the table shows, or
            that were measured in other ways.
    """
    found = chosen(name, layout.where, found)
    nothing_hidden(name, [*layout.groups, *layout.rows], found)
    columns = [column for spec in layout.metrics for column in _columns(name, spec, found)]
    _same_settings(name, columns, found)
    sections: list[tuple[str, list[Row]]] = []
    cells = [cell for cell in cells if _is_there(cell, layout.where)] or [one.cell for one in found]
    keys = {tuple(cell.point.get(key, "") for key in (*layout.groups, *layout.rows)): None for cell in cells}
    by_group = by(found, layout.groups)
    for group in dict.fromkeys(key[: len(layout.groups)] for key in keys):
        if group not in by_group:  # not one of its runs is there, so no dense figures either
            continue
        members = by_group[group]
        rows = [_dense_row(name, group, columns, members)]
        _beside(rows[0], columns, members, reported, DENSE)
        runs_of = by(members, layout.rows)
        for values in [key[len(layout.groups) :] for key in keys if key[: len(layout.groups)] == group]:
            runs = runs_of.get(values, [])
            label = _label(layout.rows, values, layout.labels, names=False)
            rows.append(Row(label, [_entry(column, runs) for column in columns], [one.record.run_id for one in runs]))
            if runs:
                _beside(rows[-1], columns, runs, reported, result_side(runs[0].record))
        _rank(columns, rows[1:])
        sections.append((_label(layout.groups, group, layout.labels, names=True), rows))
    head = ", ".join(layout.labels.get(key, key) for key in layout.rows)
    records = list({one.record.run_id: one.record for one in found}.values())
    return Table(name, layout.caption, head, columns, sections, records, len(found), len(cells))


def value_of(record: RunRecord, column: Column, side: str | None = None) -> float | None:
    """The figure of a run's result, or of ``side``; None where it, or one of those it is the mean of, is missing."""
    if column.members == _REMOVED.members:
        return record.plan["achieved"]["ratio"] if record.plan and side != "dense" else 0.0
    if column.members == _TRAINED.members:
        return record.recovery.get("trainable_parameters") if record.recovery and side is None else None
    if column.members == PRUNING_TIME.members:
        return pruning_seconds(record) if side is None else None
    if column.members == PEAK_MEMORY.members:
        return _pruning_peak(record) if side is None else None
    if column.gap:
        whole = replace(column, gap=False)
        dense, own = value_of(record, whole, "dense"), value_of(record, whole, side)
        return log(own) - log(dense) if dense and own and min(dense, own) > 0 else None
    rows = _figures(record, side or result_side(record))
    values = [rows[key]["value"] for key in column.members if key in rows]
    return mean(values) if len(values) == len(column.members) else None


def pruning_seconds(record: RunRecord) -> float | None:
    """Of calibration, plan and slicing, as if nothing had been there; None where the cost of what was is not known."""
    stages = [stage for stage in record.stages if stage["name"] in PRUNING]
    saved = [stage.get("saved_seconds", None if stage["cached"] else 0.0) for stage in stages]
    known = [cost for cost in saved if cost is not None]
    if not stages or len(known) < len(saved):
        return None
    return sum(stage["seconds"] for stage in stages) + sum(known)


def _pruning_peak(record: RunRecord) -> float | None:
    """Bytes: on the GPUs where there are any, else the resident set; None where a stage was not measured."""
    stages = [stage for stage in record.stages if stage["name"] in PRUNING]
    peaks = [stage.get("peak_gpu_bytes") or stage.get("peak_bytes") for stage in stages]
    known = [peak for peak in peaks if peak]
    return max(known) if known and len(known) == len(peaks) else None


def result_side(record: RunRecord) -> str:
    """recovered, pruned or dense: what the run ended with."""
    return next((side for side in ("recovered", "pruned") if record.measurements.get(side)), "dense")


def column_of(name: str, spec: MetricSpec, found: Sequence[Found]) -> Column:
    """The one column of a metric; ConfigError where it is none, or several."""
    columns = list(_columns(name, spec, found))
    if len(columns) != 1:
        raise ConfigError(f"{name}: metric {spec} is {len(columns)} figures; one is needed here")
    return columns[0]


def _columns(name: str, spec: MetricSpec, found: Sequence[Found]) -> Iterator[Column]:
    if isinstance(spec, str) and spec in _OF_THE_RUN:
        yield _OF_THE_RUN[spec]
        return
    pattern = spec if isinstance(spec, str) else spec.mean if isinstance(spec, MeanOf) else spec.gap
    known = {key: None for one in found for key in _figures(one.record, result_side(one.record))}
    members = [key for key in known if any(fnmatchcase("/".join(key), one.strip()) for one in pattern.split("|"))]
    if not members:
        have = ", ".join("/".join(key) for key in known)
        raise ConfigError(f"{name}: metrics={pattern}: no record has such a figure; there are {have}")
    if isinstance(spec, MeanOf):
        first = describe(*members[0])
        yield Column(Metric(spec.label, first.better, first.show, first.unit), tuple(members))
    elif isinstance(spec, GapOf):
        yield from (Column(gap(spec.label or f"gap, {describe(*key).label}"), (key,), gap=True) for key in members)
    else:
        yield from (Column(describe(*key), (key,)) for key in members)


def _figures(record: RunRecord, side: str) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    return {(row["suite"], row["task"], row["metric"]): row for row in record.measurements.get(side, ())}


def _entry(column: Column, runs: Sequence[Found]) -> Entry:
    values = {one.seed: value for one in runs if (value := value_of(one.record, column)) is not None}
    return Entry(values, notes=_notes(column, runs, None))


def _notes(column: Column, runs: Sequence[Found], side: str | None) -> tuple[str, ...]:
    """Marks of the rows that a figure is made of; ``side`` None: that of each run's result."""
    marks = {
        mark
        for run in runs
        for figures in [_figures(run.record, side or result_side(run.record))]
        for member in column.members
        if member in figures
        for mark in notes_of(figures[member])
    }
    return tuple(mark for mark in NOTES if mark in marks)


def _dense_row(name: str, group: tuple[str, ...], columns: Sequence[Column], runs: Sequence[Found]) -> Row:
    """The model as it was: the same for all runs of the section but for what was timed, of which it is the mean."""
    _one(name, group, {one.record.model["fingerprint"] for one in runs}, "model")
    _one(name, group, {one.record.model["dtype"] for one in runs}, "dtype")
    entries = []
    for column in columns:
        values = [value for one in runs if (value := value_of(one.record, column, "dense")) is not None]
        timed = any(key[0] == "cost" for key in column.members)
        if values and not timed and max(values) - min(values) > DENSE_TOLERANCE * abs(max(values)):
            raise ConfigError(
                f"{name}, {', '.join(group)}: the dense figures for {column.metric.label} differ between records "
                f"({min(values):g} to {max(values):g}); they are not of one machine or version: run them again"
            )
        notes = _notes(column, runs, "dense")
        entries.append(Entry(dict(enumerate([mean(values)])), notes=notes) if values else Entry())
    if not any(e.values for e, column in zip(entries, columns, strict=True) if column not in _OF_THE_RUN.values()):
        raise ConfigError(f"{name}: no record has dense figures, which every table needs; evaluate with evaluation=...")
    return Row("dense", entries, [])


def _beside(
    row: Row, columns: Sequence[Column], runs: Sequence[Found], reported: Sequence[Published], side: str
) -> None:
    for entry, column in zip(row.entries, columns, strict=True):
        entry.published = None if column.gap else published(reported, column.members, runs[0], side)


def _rank(columns: Sequence[Column], rows: Sequence[Row]) -> None:
    for at, column in enumerate(columns):
        if column.metric.better == 0 or len(rows) < 3:
            continue
        # By what is shown: figures that look alike are alike.
        shown: dict[str, list[tuple[float, Entry]]] = {}
        seeds = max(len(row.entries[at].values) for row in rows)
        for row in rows:
            value = row.entries[at].mean
            if value is not None and len(row.entries[at].values) == seeds:
                shown.setdefault(column.metric.show(value), []).append((value, row.entries[at]))
        ordered = sorted(shown.values(), key=lambda same: same[0][0], reverse=column.metric.better > 0)
        for rank, same in enumerate(ordered[:2], start=1):
            for _, entry in same:
                entry.rank = rank


def chosen(name: str, where: Mapping[str, str], found: Sequence[Found]) -> list[Found]:
    """Those whose keys have the values ``where`` asks for.

    Raises:
        ConfigError: there is none.
    """
    kept = [one for one in found if _is_there(one.cell, where)]
    if not kept:
        raise NothingToShowError(f"{name}: where={dict(where)}: no record of the experiment is there")
    return kept


def _is_there(cell: Cell, where: Mapping[str, str]) -> bool:
    return all(same_value(value, cell.point.get(key)) for key, value in where.items())


def by(found: Sequence[Found], keys: Sequence[str]) -> dict[tuple[str, ...], list[Found]]:
    """Runs by the values of ``keys``, in order."""
    groups: dict[tuple[str, ...], list[Found]] = {}
    for one in found:
        groups.setdefault(tuple(one.cell.point.get(key, "") for key in keys), []).append(one)
    return groups


def _label(keys: Sequence[str], values: Sequence[str], labels: Mapping[str, str], *, names: bool) -> str:
    parts = []
    for key, value in zip(keys, values, strict=True):
        said = labels.get(f"{key}={value}", value)
        parts.append(f"{labels.get(key, key)} {said}" if names and f"{key}={value}" not in labels else said)
    return ", ".join(part for part in parts if part)


def nothing_hidden(name: str, shown: Sequence[str], found: Sequence[Found]) -> None:
    """Runs that stand in one place must differ in the seed alone.

    Raises:
        ConfigError: names the keys that are not ``shown``.
    """
    for values, runs in by(found, shown).items():
        seeds = [one.seed for one in runs]
        if len(set(seeds)) < len(seeds):
            keys = {key for one in runs for key in one.cell.point}
            hidden = sorted(k for k in keys if len({one.cell.point.get(k) for one in runs}) > 1 and k != "seed")
            raise ConfigError(
                f"{name}: runs that differ in {', '.join(hidden)} would stand in one place ({', '.join(values)}); "
                "let the layout show it, or choose one value on the command line"
            )


def _same_settings(name: str, columns: Sequence[Column], found: Sequence[Found]) -> None:
    """All records agree in how a figure was measured; those of one model also in what follows from the model."""
    models = _by_model(found)
    for key in dict.fromkeys(key for column in columns for key in column.members):
        general = [setting for setting in _SETTINGS if setting not in _OF_THE_MODEL.get(key[0], ())]
        _agree(name, key, general, found)
        for runs in models.values():
            _agree(name, key, _SETTINGS, runs)


def _by_model(found: Sequence[Found]) -> dict[str, list[Found]]:
    """Runs by the model's content."""
    models: dict[str, list[Found]] = {}
    for one in found:
        models.setdefault(one.record.model["fingerprint"], []).append(one)
    return models


def _agree(name: str, key: tuple[str, str, str], settings: Sequence[str], found: Sequence[Found]) -> None:
    seen: dict[tuple[Any, ...], str] = {}
    for one in found:
        for side in ("dense", result_side(one.record)):
            row = _figures(one.record, side).get(key)
            if row is not None:
                seen.setdefault(tuple(_setting(row, setting) for setting in settings), one.record.run_id)
    if len(seen) > 1:
        (first, second), ids = list(seen)[:2], list(seen.values())
        pairs = zip(settings, first, second, strict=True)
        values = "; ".join(f"{setting}: {a} and {b}" for setting, a, b in pairs if a != b)
        raise ConfigError(
            f"{name}: {'/'.join(key)} was measured in two ways ({values}; {ids[0]} and {ids[1]}), which do not belong "
            "into one table; run one of them again"
        )


def _setting(row: Mapping[str, Any], name: str) -> Any:
    return row.get(name) if name in row else (row.get("detail") or {}).get(name)


def _one(name: str, group: Sequence[str], values: set[Any], what: str) -> None:
    if len(values) != 1:
        raise ConfigError(
            f"{name}, {', '.join(group)}: records of more than one {what} ({', '.join(sorted(map(str, values)))}); "
            "use another records folder for each"
        )
