"""Data of a table: sections of rows, with an entry for each column."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from statistics import mean, stdev

from cfsp.record.run_record import RunRecord
from cfsp.tables.metrics import NOTES, Metric
from cfsp.tables.reported import Published

#: Suite, task and metric, which identify a figure.
FigureKey = tuple[str, str, str]


@dataclass(frozen=True)
class Column:
    """Column of a table: a figure, or the mean of several.

    Attributes:
        metric: presentation of the figure.
        members: keys of the figures whose mean the column shows.
        gap: show the logarithm of the figure minus that of the dense model.
    """

    metric: Metric
    members: tuple[FigureKey, ...]
    gap: bool = False


@dataclass
class Entry:
    """A cell of a table.

    Attributes:
        values: seed -> figure.
        rank: 1 for the best of its column in its section, 2 for the second best, 0 for others and the dense row.
        published: published figure with the same settings.
        notes: marks of the figure's limitations (:func:`cfsp.tables.metrics.note_marks`).
    """

    values: dict[int, float] = field(default_factory=dict)
    rank: int = 0
    published: Published | None = None
    notes: tuple[str, ...] = ()

    @property
    def mean(self) -> float | None:
        """Mean over the seeds; None if there is no figure."""
        return mean(self.values.values()) if self.values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None for a single seed, or if a perplexity is infinite."""
        several = len(self.values) > 1 and all(map(isfinite, self.values.values()))
        return stdev(self.values.values()) if several else None

    @property
    def deviation(self) -> float | None:
        """Our figure minus the published one; None if either is missing."""
        return None if self.mean is None or self.published is None else self.mean - self.published.value


@dataclass
class Row:
    """A row of a table.

    Attributes:
        label: text of the first cell.
        entries: an entry for each column.
        run_ids: ids of the runs of the row; empty for the dense row.
    """

    label: str
    entries: list[Entry]
    run_ids: list[str]


@dataclass
class Table:
    """A table with the facts for its caption and the text below it.

    Attributes:
        name: name of the table in the layout.
        caption: caption of the table.
        head: head of the first column.
        columns: the other columns.
        sections: label and rows of each section; the first row is the dense model.
        records: records from which the table was built.
        done: number of runs with a record.
        requested: number of runs of the experiment.
    """

    name: str
    caption: str
    head: str
    columns: list[Column]
    sections: list[tuple[str, list[Row]]]
    records: list[RunRecord]
    done: int
    requested: int

    @property
    def seeds(self) -> int:
        """Largest number of seeds in an entry."""
        return max(len(entry.values) for row in self.rows for entry in row.entries)

    @property
    def rows(self) -> list[Row]:
        """Rows of all sections."""
        return [row for _, rows in self.sections for row in rows]

    def is_published(self, index: int) -> bool:
        """Return whether an entry of the column with this index has a published figure beside it."""
        return any(row.entries[index].published for row in self.rows)

    @property
    def notes(self) -> list[str]:
        """Marks of the figures in the table, in the order of :data:`cfsp.tables.metrics.NOTES`."""
        used = {mark for row in self.rows for entry in row.entries for mark in entry.notes}
        return [mark for mark in NOTES if mark in used]

    @property
    def sources(self) -> list[str]:
        """Sources of the published figures, in the order in which they appear."""
        entries = [entry for row in self.rows for entry in row.entries]
        return list(dict.fromkeys(entry.published.source for entry in entries if entry.published))
