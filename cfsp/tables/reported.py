"""Published figures with their sources, which tables show beside ours: ``experiments/<name>/reported.csv``."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfsp.errors import ConfigError
from cfsp.tables.collection import RecordedRun

#: Columns that a file must have. The other columns are configuration keys.
COLUMNS = ("metric", "seq_len", "value", "source")
DENSE = "dense"
#: First parts of the configuration keys that may be columns.
SECTIONS = ("model", "calibration", "sparsity", "importance", "allocator", "pruner", "recovery")


@dataclass(frozen=True)
class Published:
    """A published figure.

    Attributes:
        where: configuration key -> value, for the keys that the source states. ``pruner=dense`` stands for the dense
            model.
        metric: ``suite/task/metric``; several of them stand for their mean.
        seq_len: tokens of a window; None if the metric has no windows.
        value: value in the unit of our metric (accuracies as fractions).
        source: publication of the figure.
    """

    where: Mapping[str, str]
    metric: frozenset[str]
    seq_len: int | None
    value: float
    source: str


def load_reported(path: Path) -> list[Published]:
    """Load the published figures of a file. If the file does not exist, there are none.

    Raises:
        ConfigError: a column is missing or unknown, a value is not a number, or a figure has no source.
    """
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        names = reader.fieldnames or ()
        missing = [name for name in COLUMNS if name not in names]
        if missing:
            raise ConfigError(f"{path}: the column {missing[0]} is missing; the first line names the columns")
        unknown = [name for name in names if name not in COLUMNS and name.split(".")[0] not in SECTIONS]
        if unknown:
            raise ConfigError(
                f"{path}: the column {unknown[0]} is no key of a run; keys begin with {', '.join(SECTIONS)}"
            )
        return [_parse_row(row, f"{path}, line {number}") for number, row in enumerate(reader, start=2)]


def find_published(
    figures: Sequence[Published], members: Sequence[Sequence[str]], run: RecordedRun, side: str
) -> Published | None:
    """Return the published figure with the same model, method, scope, metric and window as ours; None if there is none.

    Only runs with the settings that the experiment ships have published figures beside them, because those settings
    follow the source. The README of the experiment names the settings that differ.

    Args:
        figures: the published figures.
        members: suite, task and metric of our figure, or of the figures whose mean it is.
        run: our run.
        side: side of our figure.

    Raises:
        ConfigError: several published figures match.
    """
    if not run.as_shipped:
        return None
    names = frozenset("/".join(member) for member in members)
    lengths = {
        row["seq_len"]
        for row in run.record.measurements.get(side, ())
        if row["suite"] == "perplexity" and "/".join((row["suite"], row["task"], row["metric"])) in names
    }
    matching = [
        figure
        for figure in figures
        if figure.metric == names and lengths <= {figure.seq_len} and _matches_run(figure, run, dense=side == DENSE)
    ]
    if len(matching) > 1:
        sources = "; ".join(figure.source for figure in matching)
        raise ConfigError(f"reported.csv: several figures for {' | '.join(sorted(names))} of {run.cell} ({sources})")
    return matching[0] if matching else None


def _parse_row(row: Mapping[str, str], place: str) -> Published:
    try:
        value = float(row["value"])
        seq_len = int(row["seq_len"]) if row["seq_len"] else None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{place}: {error}; value and seq_len are numbers") from error
    if not (row["source"] or "").strip():
        raise ConfigError(f"{place}: no source; a published figure is shown with the place it is from")
    where = {key: text for key, text in row.items() if key not in COLUMNS and text}
    metric = frozenset(part.strip() for part in row["metric"].split("|"))
    return Published(where, metric, seq_len, value, row["source"].strip())


def _matches_run(figure: Published, run: RecordedRun, *, dense: bool) -> bool:
    if dense != (figure.where.get("pruner") == DENSE):
        return False
    keys = [key for key in figure.where if not (dense and key == "pruner")]
    return all(is_same_value(figure.where[key], _run_value(run, key)) for key in keys)


def _run_value(run: RecordedRun, key: str) -> str | None:
    """Return the value of a key in the grid, or in the run's configuration if the grid does not have the key."""
    if key in run.cell.point:
        return run.cell.point[key]
    value: Any = run.record.configuration
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        return str(value.get("name"))
    return None if value is None else str(value)


def is_same_value(expected: str, value: str | None) -> bool:
    """Return whether two values are equal; numbers are compared as numbers."""
    try:
        return value is not None and float(expected) == float(value)
    except ValueError:
        return expected == value
