"""Rendering of tables as Markdown, LaTeX (booktabs) and CSV. Each rendered table names its records.

This module does not use pandas or tabulate, because they render cells as they are given. The tables need marks for the
best and second best figure, published figures beside the measured ones, the escapes of each format and the list of
records.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cfsp.record.run_record import RunRecord
from cfsp.system import escape
from cfsp.tables.markdown_row import markdown_row
from cfsp.tables.metrics import NOTES
from cfsp.tables.table import Column, Entry, Row, Table

_PACKAGES = ("cfsp", "torch", "transformers", "lm-eval", "peft")


def render_markdown(table: Table, command: str) -> str:
    """Render a Markdown table for each section. The best figure is in bold, the second best is underlined.

    Args:
        table: the table.
        command: command line that makes the table, for the text below it.
    """
    text = escape.markdown
    head = [text(table.head), *_render_heads(table, _MARKDOWN)]
    lines = [f"### {text(table.caption)}", ""]
    for label, rows in table.sections:
        lines += [
            *([f"**{text(label)}**", ""] if label else []),
            markdown_row(head),
            markdown_row(["---", *["--:"] * (len(head) - 1)]),
        ]
        lines += [markdown_row([text(row.label), *_render_cells(table, row, _MARKDOWN)]) for row in rows]
        lines.append("")
    lines += [f"{sentence}  " for sentence in _sentences_below(table, command, text)]
    ids = ", ".join(escape.code(record.run_id) for record in table.records)
    return "\n".join([*lines, "", f"<details><summary>Records</summary>{ids}</details>"]) + "\n"


def render_latex(table: Table, command: str) -> str:
    """Render a ``table`` environment for booktabs, with its provenance in comments above it.

    Args:
        table: the table.
        command: command line that makes the table, for the comments.
    """
    lines = [escape.latex_comment(sentence) for sentence in _sentences_below(table, command, escape.plain)]
    lines += [escape.latex_comment(f"records: {' '.join(record.run_id for record in table.records)}")]
    lines += [r"\begin{table}", r"\centering", rf"\caption{{{escape.latex(table.caption)}}}"]
    lines.append(rf"\label{{tab:{table.name}}}")
    heads = [escape.latex(table.head), *_render_heads(table, _LATEX)]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"\toprule", " & ".join(heads) + r" \\"]
    for label, rows in table.sections:
        lines.append(r"\midrule")
        if label:
            lines.append(rf"\multicolumn{{{len(heads)}}}{{l}}{{\emph{{{escape.latex(label)}}}}} \\")
        lines += [
            " & ".join([_render_latex_label(row.label), *_render_cells(table, row, _LATEX)]) + r" \\" for row in rows
        ]
    below = [rf"\par\footnotesize {escape.latex(sentence)}" for sentence in note_sentences(table)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *below, r"\end{table}"]) + "\n"


def _render_latex_label(text: str) -> str:
    """Escape the label of a row.

    An empty group protects a leading ``[`` or ``*``, which LaTeX would read as an argument of the line break before it.
    """
    escaped = escape.latex(text)
    return f"{{}}{escaped}" if escaped.lstrip().startswith(("[", "*")) else escaped


def render_csv(table: Table) -> str:
    """Render one line of CSV for each figure, unrounded.

    The columns are section, row, figure, unit, direction, mean, standard deviation, number of seeds and records.
    A table with published figures also has columns for the published figure, the deviation of ours from it, and its
    source. A table with marks also has a column for their meaning.
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
                        *(_published_csv_values(entry) if beside else ()),
                        *(["; ".join(NOTES[mark] for mark in entry.notes)] if marked else ()),
                    ]
                )  # fmt: skip
    return stream.getvalue()


def render_plain_cells(table: Table, row: Row) -> list[str]:
    """Render the cells of a row as plain text, without marks for best and second best."""
    return _render_cells(table, row, _PLAIN)


def provenance_sentences(records: Sequence[RunRecord]) -> list[str]:
    """Return sentences that state the seeds, commits, versions and machines of the records."""
    environments = [record.environment for record in records]
    commits = sorted({commit_text(environment["git"]) for environment in environments})
    versions = [f"{name} {_join_distinct(e['packages'].get(name) for e in environments)}" for name in _PACKAGES]
    machines = [f"{e['gpus'][0] if e['gpus'] else e['cpu']}, {e['cores']} cores" for e in environments]
    return [
        f"{len(records)} records, seeds {_join_distinct(record.configuration['seed'] for record in records)}.",
        f"Commits: {', '.join(commits)}. Versions: {', '.join(versions)}. Machines: {_join_distinct(machines)}.",
    ]


def commit_text(git: dict[str, Any] | None) -> str:
    """Return the name of a commit for tables.

    Args:
        git: entry ``git`` of a record's environment; None for an installed wheel.
    """
    if git is None:
        return "an installed wheel"
    return git["commit"][:12] + ("+changes" if git["dirty"] else "")


@dataclass(frozen=True)
class _Markup:
    """Markup of cells in one format. In templates, {} is the place of the text.

    Attributes:
        arrows: better direction of a column (:class:`cfsp.tables.metrics.Metric`) -> sign after its head.
        plus_minus: sign between mean and standard deviation.
        best: template for the best figure.
        second: template for the second best figure.
        escape: function that escapes a text.
        mark: template for a mark.
    """

    arrows: Mapping[int, str]
    plus_minus: str
    best: str
    second: str
    escape: Callable[[str], str]
    mark: str = "{}"


_MARKDOWN = _Markup({1: " ↑", -1: " ↓", 0: ""}, " ± ", "**{}**", "<u>{}</u>", escape.markdown)
_PLAIN = _Markup({}, " ± ", "{}", "{}", escape.plain)
_LATEX = _Markup(
    {1: r" $\uparrow$", -1: r" $\downarrow$", 0: ""}, r" $\pm$ ", r"\textbf{{{}}}", r"\underline{{{}}}", escape.latex,
    r"\textsuperscript{{{}}}",
)  # fmt: skip


def _render_heads(table: Table, markup: _Markup) -> list[str]:
    heads = []
    for at, column in enumerate(table.columns):
        heads.append(markup.escape(column.metric.label) + markup.arrows[column.metric.better])
        heads += ["published", "deviation"] if table.is_published(at) else []
    return heads


def _render_cells(table: Table, row: Row, markup: _Markup) -> list[str]:
    seeds = table.seeds if row.run_ids else 1
    cells = []
    for at, (column, entry) in enumerate(zip(table.columns, row.entries, strict=True)):
        cells.append(_render_cell(column, entry, seeds, markup))
        if table.is_published(at):
            cells += [_render_published(table, column, entry, markup), _render_deviation(column, entry, markup)]
    return cells


def _render_published(table: Table, column: Column, entry: Entry, markup: _Markup) -> str:
    if entry.published is None:
        return ""
    source = f" [{table.sources.index(entry.published.source) + 1}]" if len(table.sources) > 1 else ""
    return markup.escape(column.metric.format_value(entry.published.value)) + source


def _render_deviation(column: Column, entry: Entry, markup: _Markup) -> str:
    return "" if entry.deviation is None else markup.escape(column.metric.deviation(entry.deviation))


def _published_csv_values(entry: Entry) -> list[str]:
    if entry.published is None:
        return ["", "", ""]
    deviation = "" if entry.deviation is None else repr(entry.deviation)
    return [repr(entry.published.value), deviation, entry.published.source]


def _render_cell(column: Column, entry: Entry, seeds: int, markup: _Markup) -> str:
    if entry.mean is None:
        return ""
    text = markup.escape(column.metric.format_value(entry.mean))
    if entry.spread is not None and column.metric.better:
        text += markup.plus_minus + markup.escape(column.metric.format_value(entry.spread))
    text = {1: markup.best, 2: markup.second}.get(entry.rank, "{}").format(text)
    text += "".join(markup.mark.format(markup.escape(note)) for note in entry.notes)
    return text if len(entry.values) == seeds else f"{text} ({len(entry.values)} of {seeds} seeds)"


def _sentences_below(table: Table, command: str, text: Callable[[str], str]) -> list[str]:
    """Return the sentences below a table.

    Args:
        table: the table.
        command: command line that makes the table.
        text: function that escapes text from records and from the command line.
    """
    marks = "Best in bold, second best underlined; the dense row does not compete."
    spread = (
        "Mean ± standard deviation over seeds." if len({r.configuration["seed"] for r in table.records}) > 1 else ""
    )
    return [
        " ".join(part for part in (spread, marks) if part),
        *_missing_run_sentences(table),
        *(text(sentence) for sentence in note_sentences(table)),
        *source_sentences(table, text),
        *(text(sentence) for sentence in provenance_sentences(table.records)),
        text(f"Made by: {command}"),
    ]


def _missing_run_sentences(table: Table) -> list[str]:
    if table.done == table.requested:
        return []
    return [
        f"{table.done} of {table.requested} runs have a record; cells of the others are empty, and rows that lack a "
        "seed do not compete."
    ]


def note_sentences(table: Table) -> list[str]:
    """Return a sentence for each mark in the table."""
    return [f"{mark} {NOTES[mark]}." for mark in table.notes]


def source_sentences(table: Table, text: Callable[[str], str] = escape.plain) -> list[str]:
    """Return a sentence that names the sources of the published figures; empty if there are none.

    Args:
        table: the table.
        text: function that escapes a source.
    """
    if not table.sources:
        return []
    escaped = [text(source) for source in table.sources]
    numbered = [f"[{at}] {source}" for at, source in enumerate(escaped, start=1)]
    listed = "; ".join(numbered if len(numbered) > 1 else escaped)
    return [f"Published: {listed}. Deviation: ours less the published one."]


def _join_distinct(values: Iterable[Any]) -> str:
    return ", ".join(sorted({str(value) for value in values if value is not None})) or "none"
