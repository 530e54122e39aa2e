"""Tables from the records of an experiment, with means over seeds, the dense row first, and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from cfsp.errors import ConfigError
from cfsp.sweep.experiment import Cell
from cfsp.tables.collection import RecordedRun
from cfsp.tables.layout import TableLayout
from cfsp.tables.metrics import NOTES, note_marks
from cfsp.tables.reported import DENSE, Published, find_published, is_same_value
from cfsp.tables.run_figures import RUN_COLUMNS, column_value, measurements_by_key, result_side, select_columns
from cfsp.tables.table import Column, Entry, FigureKey, Row, Table

#: Settings of a measurement that must be equal for all figures of a column.
_MEASUREMENT_SETTINGS = (
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
#: Suite -> settings that depend on the model. The number of tokens of a text and the effect of bos=auto depend on its
#: tokenizer, and the harness uses its longest window.
_MODEL_DEPENDENT_SETTINGS = {"perplexity": ("n", "bos"), "zero_shot": ("seq_len",)}
#: Largest relative difference between dense figures of one model. Different processors sum in different orders.
DENSE_TOLERANCE = 1e-4


class NothingToShowError(ConfigError):
    """No run of the experiment matches the ``where`` of a table or figure."""


def build_table(
    name: str,
    layout: TableLayout,
    runs: Sequence[RecordedRun],
    reported: Sequence[Published] = (),
    cells: Sequence[Cell] = (),
) -> Table:
    """Build a table from ``runs``, with published figures of the same settings beside them.

    Args:
        name: name of the table in its layout.
        layout: layout of the table.
        runs: the runs with a record, in the order of the grid.
        reported: published figures.
        cells: all runs of the experiment, in order. Rows of runs without a record are empty.

    Raises:
        ConfigError: no record has one of the metrics, runs differ in keys that the table does not show, or figures of
            one column were measured with different settings.
    """
    runs = select_runs(name, layout.where, runs)
    check_nothing_hidden(name, [*layout.groups, *layout.rows], runs)
    columns = [column for spec in layout.metrics for column in select_columns(name, spec, runs)]
    _check_settings(name, columns, runs)
    cells = [cell for cell in cells if _is_selected(cell, layout.where)] or [run.cell for run in runs]
    keys = list(
        dict.fromkeys(tuple(cell.point.get(key, "") for key in (*layout.groups, *layout.rows)) for cell in cells)
    )
    sections: list[tuple[str, list[Row]]] = []
    by_group = group_by(runs, layout.groups)
    n_groups = len(layout.groups)
    for group in dict.fromkeys(key[:n_groups] for key in keys):
        if group not in by_group:  # no run of the group has a record, so there are no dense figures either
            continue
        row_keys = [key[n_groups:] for key in keys if key[:n_groups] == group]
        rows = _section_rows(name, layout, group, row_keys, columns, by_group[group], reported)
        sections.append((_join_labels(layout.groups, group, layout.labels, names=True), rows))
    head = ", ".join(layout.labels.get(key, key) for key in layout.rows)
    records = list({run.record.run_id: run.record for run in runs}.values())
    return Table(name, layout.caption, head, columns, sections, records, len(runs), len(cells))


def _section_rows(
    name: str,
    layout: TableLayout,
    group: tuple[str, ...],
    row_keys: Sequence[tuple[str, ...]],
    columns: Sequence[Column],
    runs: Sequence[RecordedRun],
    reported: Sequence[Published],
) -> list[Row]:
    """Return the rows of one group, the dense model first.

    Args:
        name: name of the table.
        layout: layout of the table.
        group: values of the keys of the group.
        row_keys: values of the keys of each row.
        columns: columns of the table.
        runs: runs of the group.
        reported: published figures.
    """
    rows = [_build_dense_row(name, group, columns, runs)]
    _add_published(rows[0], columns, runs, reported, DENSE)
    by_row = group_by(runs, layout.rows)
    for values in row_keys:
        members = by_row.get(values, [])
        label = _join_labels(layout.rows, values, layout.labels, names=False)
        entries = [_build_entry(column, members) for column in columns]
        rows.append(Row(label, entries, [run.record.run_id for run in members]))
        if members:
            _add_published(rows[-1], columns, members, reported, result_side(members[0].record))
    _set_ranks(columns, rows[1:])
    return rows


def _build_entry(column: Column, runs: Sequence[RecordedRun]) -> Entry:
    values = {run.seed: value for run in runs if (value := column_value(run.record, column)) is not None}
    return Entry(values, notes=_note_marks(column, runs, None))


def _note_marks(column: Column, runs: Sequence[RecordedRun], side: str | None) -> tuple[str, ...]:
    """Return the marks of the measurements behind an entry.

    Args:
        column: column of the entry.
        runs: runs whose mean the entry shows.
        side: side of the measurements; None: the side that each run ended with.
    """
    marks = {
        mark
        for run in runs
        for figures in [measurements_by_key(run.record, side or result_side(run.record))]
        for member in column.members
        if member in figures
        for mark in note_marks(figures[member])
    }
    return tuple(mark for mark in NOTES if mark in marks)


def _build_dense_row(name: str, group: tuple[str, ...], columns: Sequence[Column], runs: Sequence[RecordedRun]) -> Row:
    """Return the row of the dense model. Its figures are equal in all runs, except timings, which are averaged."""
    _check_equal(name, group, {run.record.model["fingerprint"] for run in runs}, "model")
    _check_equal(name, group, {run.record.model["dtype"] for run in runs}, "dtype")
    entries = []
    for column in columns:
        values = [value for run in runs if (value := column_value(run.record, column, "dense")) is not None]
        timed = any(key[0] == "cost" for key in column.members)
        if values and not timed and max(values) - min(values) > DENSE_TOLERANCE * abs(max(values)):
            raise ConfigError(
                f"{name}, {', '.join(group)}: the dense figures for {column.metric.label} differ between records "
                f"({min(values):g} to {max(values):g}); they are not of one machine or version: run them again"
            )
        notes = _note_marks(column, runs, "dense")
        entries.append(Entry(dict(enumerate([mean(values)])), notes=notes) if values else Entry())
    measured = [entry for entry, column in zip(entries, columns, strict=True) if column not in RUN_COLUMNS.values()]
    if not any(entry.values for entry in measured):
        raise ConfigError(f"{name}: no record has dense figures, which every table needs; evaluate with evaluation=...")
    return Row("dense", entries, [])


def _add_published(
    row: Row, columns: Sequence[Column], runs: Sequence[RecordedRun], reported: Sequence[Published], side: str
) -> None:
    for entry, column in zip(row.entries, columns, strict=True):
        entry.published = None if column.gap else find_published(reported, column.members, runs[0], side)


def _set_ranks(columns: Sequence[Column], rows: Sequence[Row]) -> None:
    for at, column in enumerate(columns):
        if column.metric.better == 0 or len(rows) < 3:
            continue
        # Compare the figures as they are shown: figures that look equal have equal ranks.
        shown: dict[str, list[tuple[float, Entry]]] = {}
        seeds = max(len(row.entries[at].values) for row in rows)
        for row in rows:
            value = row.entries[at].mean
            if value is not None and len(row.entries[at].values) == seeds:
                shown.setdefault(column.metric.format_value(value), []).append((value, row.entries[at]))
        ordered = sorted(shown.values(), key=lambda same: same[0][0], reverse=column.metric.better > 0)
        for rank, same in enumerate(ordered[:2], start=1):
            for _, entry in same:
                entry.rank = rank


def select_runs(name: str, where: Mapping[str, str], runs: Sequence[RecordedRun]) -> list[RecordedRun]:
    """Return the runs that have the value of every key in ``where``.

    Raises:
        NothingToShowError: no run matches.
    """
    selected = [run for run in runs if _is_selected(run.cell, where)]
    if not selected:
        raise NothingToShowError(f"{name}: where={dict(where)}: no record of the experiment is there")
    return selected


def _is_selected(cell: Cell, where: Mapping[str, str]) -> bool:
    return all(is_same_value(value, cell.point.get(key)) for key, value in where.items())


def group_by(runs: Sequence[RecordedRun], keys: Sequence[str]) -> dict[tuple[str, ...], list[RecordedRun]]:
    """Group runs by the values of ``keys``; groups and runs keep their order."""
    groups: dict[tuple[str, ...], list[RecordedRun]] = {}
    for run in runs:
        groups.setdefault(tuple(run.cell.point.get(key, "") for key in keys), []).append(run)
    return groups


def _join_labels(keys: Sequence[str], values: Sequence[str], labels: Mapping[str, str], *, names: bool) -> str:
    parts = []
    for key, value in zip(keys, values, strict=True):
        text = labels.get(f"{key}={value}", value)
        parts.append(f"{labels.get(key, key)} {text}" if names and f"{key}={value}" not in labels else text)
    return ", ".join(part for part in parts if part)


def check_nothing_hidden(name: str, shown: Sequence[str], runs: Sequence[RecordedRun]) -> None:
    """Check that runs at the same place of a table or figure differ in the seed only.

    Args:
        name: name of the table or figure.
        shown: keys whose values the table or figure shows.
        runs: the runs that it shows.

    Raises:
        ConfigError: runs differ in keys that are not shown.
    """
    for values, members in group_by(runs, shown).items():
        seeds = [run.seed for run in members]
        if len(set(seeds)) < len(seeds):
            keys = {key for run in members for key in run.cell.point}
            hidden = sorted(k for k in keys if len({run.cell.point.get(k) for run in members}) > 1 and k != "seed")
            raise ConfigError(
                f"{name}: runs that differ in {', '.join(hidden)} would stand in one place ({', '.join(values)}); "
                "let the layout show it, or choose one value on the command line"
            )


def _check_settings(name: str, columns: Sequence[Column], runs: Sequence[RecordedRun]) -> None:
    """Check that every figure was measured with the same settings in all records.

    Settings that depend on the model must be equal only among the records of one model.
    """
    by_model: dict[str, list[RecordedRun]] = {}
    for run in runs:
        by_model.setdefault(run.record.model["fingerprint"], []).append(run)
    for key in dict.fromkeys(key for column in columns for key in column.members):
        general = [
            setting for setting in _MEASUREMENT_SETTINGS if setting not in _MODEL_DEPENDENT_SETTINGS.get(key[0], ())
        ]
        _check_agreement(name, key, general, runs)
        for members in by_model.values():
            _check_agreement(name, key, _MEASUREMENT_SETTINGS, members)


def _check_agreement(name: str, key: FigureKey, settings: Sequence[str], runs: Sequence[RecordedRun]) -> None:
    seen: dict[tuple[Any, ...], str] = {}
    for run in runs:
        for side in ("dense", result_side(run.record)):
            row = measurements_by_key(run.record, side).get(key)
            if row is not None:
                seen.setdefault(tuple(_measurement_setting(row, setting) for setting in settings), run.record.run_id)
    if len(seen) > 1:
        (first, second), ids = list(seen)[:2], list(seen.values())
        pairs = zip(settings, first, second, strict=True)
        values = "; ".join(f"{setting}: {a} and {b}" for setting, a, b in pairs if a != b)
        raise ConfigError(
            f"{name}: {'/'.join(key)} was measured in two ways ({values}; {ids[0]} and {ids[1]}), which do not belong "
            "into one table; run one of them again"
        )


def _measurement_setting(row: Mapping[str, Any], name: str) -> Any:
    return row.get(name) if name in row else (row.get("detail") or {}).get(name)


def _check_equal(name: str, group: Sequence[str], values: set[Any], quantity: str) -> None:
    if len(values) != 1:
        raise ConfigError(
            f"{name}, {', '.join(group)}: records of more than one {quantity} ({', '.join(sorted(map(str, values)))}); "
            "use another records folder for each"
        )
