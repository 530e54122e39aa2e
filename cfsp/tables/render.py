"""A table as Markdown, LaTeX (booktabs) and CSV. Each states which records it was made from.

It is written here because the marks (best, second best, deviation, published beside measured), the escapes of each
format and the list of records are what the tables are for; pandas and tabulate render cells as they are given.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cfsp.record.run_record import RunRecord
from cfsp.system import escape
from cfsp.tables.markdown_line import line
from cfsp.tables.metrics import NOTES
from cfsp.tables.table import Column, Entry, Row, Table

_PACKAGES = ("cfsp", "torch", "transformers", "lm-eval", "peft")


def markdown(table: Table, command: str) -> str:
    """Render a Markdown table for each section; the best is in bold, the second best underlined."""
    text = escape.markdown
    head = [text(table.head), *_heads(table, _MARKDOWN)]
    lines = [f"### {text(table.caption)}", ""]
    for label, rows in table.sections:
        lines += [*([f"**{text(label)}**", ""] if label else []), line(head), line(["---", *["--:"] * (len(head) - 1)])]
        lines += [line([text(row.label), *_cells(table, row, _MARKDOWN)]) for row in rows]
        lines.append("")
    lines += [f"{sentence}  " for sentence in _notes_below(table, command, text)]
    ids = ", ".join(escape.code(record.run_id) for record in table.records)
    return "\n".join([*lines, "", f"<details><summary>Records</summary>{ids}</details>"]) + "\n"


def latex(table: Table, command: str) -> str:
    """Render a ``table`` environment for booktabs, with its provenance in comments above it."""
    lines = [escape.latex_comment(sentence) for sentence in _notes_below(table, command, escape.plain)]
    lines += [escape.latex_comment(f"records: {' '.join(record.run_id for record in table.records)}")]
    lines += [r"\begin{table}", r"\centering", rf"\caption{{{escape.latex(table.caption)}}}"]
    lines.append(rf"\label{{tab:{table.name}}}")
    heads = [escape.latex(table.head), *_heads(table, _TEX)]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"\toprule", " & ".join(heads) + r" \\"]
    for label, rows in table.sections:
        lines.append(r"\midrule")
        if label:
            lines.append(rf"\multicolumn{{{len(heads)}}}{{l}}{{\emph{{{escape.latex(label)}}}}} \\")
        lines += [" & ".join([_tex_label(row.label), *_cells(table, row, _TEX)]) + r" \\" for row in rows]
    below = [rf"\par\footnotesize {escape.latex(sentence)}" for sentence in notes(table)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *below, r"\end{table}"]) + "\n"


def _tex_label(text: str) -> str:
    """Escape the label of a row: after a line break, LaTeX would read ``[`` and ``*`` as arguments of the break."""
    escaped = escape.latex(text)
    return f"{{}}{escaped}" if escaped.lstrip().startswith(("[", "*")) else escaped


def comma_separated(table: Table) -> str:
    """Render one line of CSV for each figure, unrounded.

    The columns are section, row, figure, unit, direction, mean, standard deviation, number of seeds and records.
    A table with published figures also has the published figure, our figure less it, and its source. A table with
    marks also has their meaning.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    beside = ["published", "deviation", "source"] if table.sources else []
    marked = ["notes"] if table.notes else []
    head = escape.cell(table.head)
    writer.writerow(["section", head, "metric", "unit", "better", "mean", "std", "seeds", "records", *beside, *marked])
    for label, rows in table.sections:
        for row in rows:
            for column, entry in zip(table.columns, row.entries, strict=True):
                if entry.mean is None and entry.published is None:
                    continue
                better = {1: "higher", -1: "lower", 0: ""}[column.metric.better]
                spread = "" if entry.spread is None else repr(entry.spread)
                seeds = len(entry.values) if row.run_ids else ""
                writer.writerow(
                    escape.cell(value)
                    for value in [
                        label, row.label, column.metric.label, column.metric.unit, better,
                        "" if entry.mean is None else repr(entry.mean), spread, seeds, " ".join(row.run_ids),
                        *(_published_values(entry) if beside else ()),
                        *(["; ".join(NOTES[mark] for mark in entry.notes)] if marked else ()),
                    ]
                )  # fmt: skip
    return stream.getvalue()


def plain_cells(table: Table, row: Row) -> list[str]:
    """Return the texts of a row without marks for best and second best."""
    return _cells(table, row, _PLAIN)


def provenance(records: Sequence[RunRecord]) -> list[str]:
    """Return sentences on seeds, commits, versions and machines of the records."""
    environments = [record.environment for record in records]
    commits = sorted({commit_of(environment["git"]) for environment in environments})
    versions = [f"{name} {_several(e['packages'].get(name) for e in environments)}" for name in _PACKAGES]
    machines = [f"{e['gpus'][0] if e['gpus'] else e['cpu']}, {e['cores']} cores" for e in environments]
    return [
        f"{len(records)} records, seeds {_several(record.configuration['seed'] for record in records)}.",
        f"Commits: {', '.join(commits)}. Versions: {', '.join(versions)}. Machines: {_several(machines)}.",
    ]


def commit_of(git: dict[str, Any] | None) -> str:
    """Return a commit as tables name it; ``git`` is the entry of a record's environment."""
    if git is None:
        return "an installed wheel"
    return git["commit"][:12] + ("+changes" if git["dirty"] else "")


@dataclass(frozen=True)
class _Markup:
    """Markup of a cell; {} is the place of the text.

    Attributes:
        arrows: sign after a head, by the direction that is better.
        plus_minus: sign between mean and standard deviation.
        best: markup of the best figure.
        second: markup of the second best figure.
        escape: escapes a text.
        mark: markup of a mark.
    """

    arrows: Mapping[int, str]
    plus_minus: str
    best: str
    second: str
    escape: Callable[[str], str]
    mark: str = "{}"


_MARKDOWN = _Markup({1: " ↑", -1: " ↓", 0: ""}, " ± ", "**{}**", "<u>{}</u>", escape.markdown)
_PLAIN = _Markup({}, " ± ", "{}", "{}", escape.plain)
_TEX = _Markup(
    {1: r" $\uparrow$", -1: r" $\downarrow$", 0: ""}, r" $\pm$ ", r"\textbf{{{}}}", r"\underline{{{}}}", escape.latex,
    r"\textsuperscript{{{}}}",
)  # fmt: skip


def _heads(table: Table, markup: _Markup) -> list[str]:
    heads = []
    for at, column in enumerate(table.columns):
        heads.append(markup.escape(column.metric.label) + markup.arrows[column.metric.better])
        heads += ["published", "deviation"] if table.is_published(at) else []
    return heads


def _cells(table: Table, row: Row, markup: _Markup) -> list[str]:
    seeds = table.seeds if row.run_ids else 1
    cells = []
    for at, (column, entry) in enumerate(zip(table.columns, row.entries, strict=True)):
        cells.append(_cell(column, entry, seeds, markup))
        if table.is_published(at):
            cells += [_published(table, column, entry, markup), _deviation(column, entry, markup)]
    return cells


def _published(table: Table, column: Column, entry: Entry, markup: _Markup) -> str:
    if entry.published is None:
        return ""
    source = f" [{table.sources.index(entry.published.source) + 1}]" if len(table.sources) > 1 else ""
    return markup.escape(column.metric.show(entry.published.value)) + source


def _deviation(column: Column, entry: Entry, markup: _Markup) -> str:
    return "" if entry.deviation is None else markup.escape(column.metric.deviation(entry.deviation))


def _published_values(entry: Entry) -> list[str]:
    if entry.published is None:
        return ["", "", ""]
    deviation = "" if entry.deviation is None else repr(entry.deviation)
    return [repr(entry.published.value), deviation, entry.published.source]


def _cell(column: Column, entry: Entry, seeds: int, markup: _Markup) -> str:
    if entry.mean is None:
        return ""
    text = markup.escape(column.metric.show(entry.mean))
    if entry.spread is not None and column.metric.better:
        text += markup.plus_minus + markup.escape(column.metric.show(entry.spread))
    text = {1: markup.best, 2: markup.second}.get(entry.rank, "{}").format(text)
    text += "".join(markup.mark.format(markup.escape(note)) for note in entry.notes)
    return text if len(entry.values) == seeds else f"{text} ({len(entry.values)} of {seeds} seeds)"


def _notes_below(table: Table, command: str, text: Callable[[str], str]) -> list[str]:
    """Return the sentences below a table; ``text`` escapes what comes from records and the command line."""
    marks = "Best in bold, second best underlined; the dense row does not compete."
    spread = (
        "Mean ± standard deviation over seeds." if len({r.configuration["seed"] for r in table.records}) > 1 else ""
    )
    return [
        " ".join(part for part in (spread, marks) if part),
        *_missing(table),
        *(text(sentence) for sentence in notes(table)),
        *sources(table, text),
        *(text(sentence) for sentence in provenance(table.records)),
        text(f"Made by: {command}"),
    ]


def _missing(table: Table) -> list[str]:
    if table.done == table.requested:
        return []
    return [
        f"{table.done} of {table.requested} runs have a record; cells of the others are empty, and rows that lack a "
        "seed do not compete."
    ]


def notes(table: Table) -> list[str]:
    """Return a sentence for each mark that stands at a figure."""
    return [f"{mark} {NOTES[mark]}." for mark in table.notes]


def sources(table: Table, text: Callable[[str], str] = escape.plain) -> list[str]:
    """Return a sentence on the sources of published figures, escaped by ``text``; no sentence where there are none."""
    if not table.sources:
        return []
    escaped = [text(source) for source in table.sources]
    numbered = [f"[{at}] {source}" for at, source in enumerate(escaped, start=1)]
    listed = "; ".join(numbered if len(numbered) > 1 else escaped)
    return [f"Published: {listed}. Deviation: ours less the published one."]


def _several(values: Iterable[Any]) -> str:
    return ", ".join(sorted({str(value) for value in values if value is not None})) or "none"
