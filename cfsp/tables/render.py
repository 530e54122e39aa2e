"""A table as Markdown, LaTeX (booktabs) and CSV; every form says what it was made from."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cfsp.record.run_record import RunRecord
from cfsp.system import escape
from cfsp.tables.grid import Column, Entry, Row, Table
from cfsp.tables.markdown_line import line
from cfsp.tables.metrics import NOTES

_PACKAGES = ("cfsp", "torch", "transformers", "lm-eval", "peft")


def markdown(table: Table, command: str) -> str:
    """A Markdown table per section; best in bold, second best underlined."""
    text = escape.markdown
    head = [text(table.head), *_heads(table, _MARKDOWN)]
    lines = [f"### {text(table.caption)}", ""]
    for label, rows in table.sections:
        lines += [*([f"**{text(label)}**", ""] if label else []), line(head), line(["---", *["--:"] * (len(head) - 1)])]
        lines += [line([text(row.label), *_cells(table, row, _MARKDOWN)]) for row in rows]
        lines.append("")
    lines += [f"{sentence}  " for sentence in _said(table, command, text)]
    ids = ", ".join(escape.code(record.run_id) for record in table.records)
    return "\n".join([*lines, "", f"<details><summary>Records</summary>{ids}</details>"]) + "\n"


def latex(table: Table, command: str) -> str:
    """A ``table`` environment for booktabs; what it was made from stands in comments above it."""
    lines = [escape.latex_comment(sentence) for sentence in _said(table, command, escape.plain)]
    lines += [escape.latex_comment(f"records: {' '.join(record.run_id for record in table.records)}")]
    lines += [r"\begin{table}", r"\centering", rf"\caption{{{escape.latex(table.caption)}}}"]
    lines.append(rf"\label{{tab:{table.name}}}")
    heads = [escape.latex(table.head), *_heads(table, _TEX)]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"\toprule", " & ".join(heads) + r" \\"]
    for label, rows in table.sections:
        lines.append(r"\midrule")
        if label:
            lines.append(rf"\multicolumn{{{len(heads)}}}{{l}}{{\emph{{{escape.latex(label)}}}}} \\")
        lines += [" & ".join([escape.latex(row.label), *_cells(table, row, _TEX)]) + r" \\" for row in rows]
    below = [rf"\par\footnotesize {escape.latex(sentence)}" for sentence in notes(table)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *below, r"\end{table}"]) + "\n"


def comma_separated(table: Table) -> str:
    """One line per figure, unrounded: section, row, figure, unit, direction, mean, std, number of seeds, records.

    Where the table has published figures: also the published one, ours less it, and its source. Where it has marks:
    also what they say.
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
    """The texts of a row without marks for best and second best."""
    return _cells(table, row, _PLAIN)


def provenance(records: Sequence[RunRecord]) -> list[str]:
    """Sentences: seeds, commits, versions and machines of the records."""
    environments = [record.environment for record in records]
    commits = sorted({commit_of(environment["git"]) for environment in environments})
    versions = [f"{name} {_several(e['packages'].get(name) for e in environments)}" for name in _PACKAGES]
    machines = [f"{e['gpus'][0] if e['gpus'] else e['cpu']}, {e['cores']} cores" for e in environments]
    return [
        f"{len(records)} records, seeds {_several(record.configuration['seed'] for record in records)}.",
        f"Commits: {', '.join(commits)}. Versions: {', '.join(versions)}. Machines: {_several(machines)}.",
    ]


def commit_of(git: dict[str, Any] | None) -> str:
    """A commit as tables name it; ``git`` is that of a record's environment."""
    if git is None:
        return "an installed wheel"
    return git["commit"][:12] + ("+changes" if git["dirty"] else "")


@dataclass(frozen=True)
class _Form:
    """How a cell is written; the marks hold the text at {}. ``arrows``: by the direction that is better."""

    arrows: Mapping[int, str]
    plus_minus: str
    best: str
    second: str
    escape: Callable[[str], str]
    mark: str = "{}"


_MARKDOWN = _Form({1: " ↑", -1: " ↓", 0: ""}, " ± ", "**{}**", "<u>{}</u>", escape.markdown)
_PLAIN = _Form({}, " ± ", "{}", "{}", escape.plain)
_TEX = _Form(
    {1: r" $\uparrow$", -1: r" $\downarrow$", 0: ""}, r" $\pm$ ", r"\textbf{{{}}}", r"\underline{{{}}}", escape.latex,
    r"\textsuperscript{{{}}}",
)  # fmt: skip


def _heads(table: Table, form: _Form) -> list[str]:
    heads = []
    for at, column in enumerate(table.columns):
        heads.append(form.escape(column.metric.label) + form.arrows[column.metric.better])
        heads += ["published", "deviation"] if table.is_published(at) else []
    return heads


def _cells(table: Table, row: Row, form: _Form) -> list[str]:
    seeds = table.seeds if row.run_ids else 1
    cells = []
    for at, (column, entry) in enumerate(zip(table.columns, row.entries, strict=True)):
        cells.append(_cell(column, entry, seeds, form))
        if table.is_published(at):
            cells += [_published(table, column, entry, form), _deviation(column, entry, form)]
    return cells


def _published(table: Table, column: Column, entry: Entry, form: _Form) -> str:
    if entry.published is None:
        return ""
    source = f" [{table.sources.index(entry.published.source) + 1}]" if len(table.sources) > 1 else ""
    return form.escape(column.metric.show(entry.published.value)) + source


def _deviation(column: Column, entry: Entry, form: _Form) -> str:
    return "" if entry.deviation is None else form.escape(column.metric.deviation(entry.deviation))


def _published_values(entry: Entry) -> list[str]:
    if entry.published is None:
        return ["", "", ""]
    deviation = "" if entry.deviation is None else repr(entry.deviation)
    return [repr(entry.published.value), deviation, entry.published.source]


def _cell(column: Column, entry: Entry, seeds: int, form: _Form) -> str:
    if entry.mean is None:
        return ""
    text = form.escape(column.metric.show(entry.mean))
    if entry.spread is not None and column.metric.better:
        text += form.plus_minus + form.escape(column.metric.show(entry.spread))
    text = {1: form.best, 2: form.second}.get(entry.rank, "{}").format(text)
    text += "".join(form.mark.format(form.escape(note)) for note in entry.notes)
    return text if len(entry.values) == seeds else f"{text} ({len(entry.values)} of {seeds} seeds)"


def _said(table: Table, command: str, text: Callable[[str], str]) -> list[str]:
    """Sentences below a table; ``text`` escapes what records and the command line bring into them."""
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
    if table.done == table.wanted:
        return []
    return [
        f"{table.done} of {table.wanted} runs have a record; cells of the others are empty, and rows that lack a "
        "seed do not compete."
    ]


def notes(table: Table) -> list[str]:
    """A sentence for each mark that stands at a figure."""
    return [f"{mark} {NOTES[mark]}." for mark in table.notes]


def sources(table: Table, text: Callable[[str], str] = escape.plain) -> list[str]:
    """A sentence on where the published figures are from, each escaped by ``text``; none where there are none."""
    if not table.sources:
        return []
    escaped = [text(source) for source in table.sources]
    numbered = [f"[{at}] {source}" for at, source in enumerate(escaped, start=1)]
    said = "; ".join(numbered if len(numbered) > 1 else escaped)
    return [f"Published: {said}. Deviation: ours less the published one."]


def _several(values: Iterable[Any]) -> str:
    return ", ".join(sorted({str(value) for value in values if value is not None})) or "none"
