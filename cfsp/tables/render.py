"""A table as Markdown, LaTeX (booktabs) and CSV; every form says what it was made from."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cfsp.record.run_record import RunRecord
from cfsp.tables.grid import Column, Entry, Row, Table
from cfsp.tables.methods import line

_ARROWS = {1: "↑", -1: "↓", 0: ""}
_PACKAGES = ("cfsp", "torch", "transformers", "lm-eval", "peft")
_LATEX = {
    "\\": r"\textbackslash{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def markdown(table: Table, command: str) -> str:
    """A Markdown table per section; best in bold, second best underlined."""
    head = [table.head, *(f"{column.metric.label} {_ARROWS[column.metric.better]}".strip() for column in table.columns)]
    lines = [f"### {table.caption}", ""]
    for label, rows in table.sections:
        lines += [*([f"**{label}**", ""] if label else []), line(head), line(["---", *["--:"] * len(table.columns)])]
        lines += [line([row.label, *_cells(table, row, _MARKDOWN)]) for row in rows]
        lines.append("")
    lines += [f"{sentence}  " for sentence in _said(table, command)]
    ids = ", ".join(f"`{record.run_id}`" for record in table.records)
    return "\n".join([*lines, "", f"<details><summary>Records</summary>{ids}</details>"]) + "\n"


def latex(table: Table, command: str) -> str:
    """A ``table`` environment for booktabs; what it was made from stands in comments above it."""
    lines = [f"% {sentence}" for sentence in _said(table, command)]
    lines += [f"% records: {' '.join(record.run_id for record in table.records)}"]
    lines += [r"\begin{table}", r"\centering", rf"\caption{{{_tex(table.caption)}}}", rf"\label{{tab:{table.name}}}"]
    lines += [rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule"]
    arrows = {1: r" $\uparrow$", -1: r" $\downarrow$", 0: ""}
    heads = [_tex(table.head), *(_tex(c.metric.label) + arrows[c.metric.better] for c in table.columns)]
    lines.append(" & ".join(heads) + r" \\")
    for label, rows in table.sections:
        lines.append(r"\midrule")
        if label:
            lines.append(rf"\multicolumn{{{len(table.columns) + 1}}}{{l}}{{\emph{{{_tex(label)}}}}} \\")
        lines += [" & ".join([_tex(row.label), *_cells(table, row, _TEX)]) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def comma_separated(table: Table) -> str:
    """One line per figure, unrounded: section, row, figure, unit, direction, mean, std, number of seeds, records."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["section", table.head, "metric", "unit", "better", "mean", "std", "seeds", "records"])
    for label, rows in table.sections:
        for row in rows:
            for column, entry in zip(table.columns, row.entries, strict=True):
                if entry.mean is None:
                    continue
                better = {1: "higher", -1: "lower", 0: ""}[column.metric.better]
                spread = "" if entry.spread is None else repr(entry.spread)
                seeds = len(entry.values) if row.run_ids else ""
                writer.writerow(
                    [
                        label, row.label, column.metric.label, column.metric.unit, better,
                        repr(entry.mean), spread, seeds, " ".join(row.run_ids),
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
    """How a cell is written; the marks hold the text at {}."""

    plus_minus: str
    best: str
    second: str
    escape: Callable[[str], str]


def _tex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


_MARKDOWN = _Form(" ± ", "**{}**", "<u>{}</u>", str)
_PLAIN = _Form(" ± ", "{}", "{}", str)
_TEX = _Form(r" $\pm$ ", r"\textbf{{{}}}", r"\underline{{{}}}", _tex)


def _cells(table: Table, row: Row, form: _Form) -> list[str]:
    seeds = table.seeds if row.run_ids else 1
    return [_cell(column, entry, seeds, form) for column, entry in zip(table.columns, row.entries, strict=True)]


def _cell(column: Column, entry: Entry, seeds: int, form: _Form) -> str:
    if entry.mean is None:
        return ""
    text = form.escape(column.metric.show(entry.mean))
    if entry.spread is not None and column.metric.better:
        text += form.plus_minus + form.escape(column.metric.show(entry.spread))
    text = {1: form.best, 2: form.second}.get(entry.rank, "{}").format(text)
    return text if len(entry.values) == seeds else f"{text} ({len(entry.values)} of {seeds} seeds)"


def _said(table: Table, command: str) -> list[str]:
    marks = "Best in bold, second best underlined; the dense row does not compete."
    spread = (
        "Mean ± standard deviation over seeds." if len({r.configuration["seed"] for r in table.records}) > 1 else ""
    )
    return [" ".join(part for part in (spread, marks) if part), *provenance(table.records), f"Made by: {command}"]


def _several(values: Iterable[Any]) -> str:
    return ", ".join(sorted({str(value) for value in values if value is not None})) or "none"
