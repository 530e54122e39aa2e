"""Summary table at the end of a run, with dense beside pruned."""

from __future__ import annotations

from typing import Any

from rich.markup import escape as rich_escape
from rich.table import Table

from cfsp.record.run_record import RunRecord
from cfsp.system import escape
from cfsp.tables.metrics import NOTES, describe_metric, note_marks, suite_order


def summary_table(record: RunRecord) -> Table | None:
    """Return a rich table with every figure of the run; None if nothing was measured."""
    sides = [side for side, rows in record.measurements.items() if rows]
    if not sides:
        return None
    figures: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for side in sides:
        for row in record.measurements[side]:
            figures.setdefault((row["suite"], row["task"], row["metric"]), {})[side] = row
    compared = len(sides) > 1
    title = f"{record.model.get('name', '')}: {_method_and_ratio(record)}"
    explained = [f"change: {sides[-1]} relative to dense; tasks in points"] if compared else []
    marks = {mark for rows in figures.values() for row in rows.values() for mark in note_marks(row)}
    caption = "\n".join([*explained, *(f"{mark} {NOTES[mark]}" for mark in NOTES if mark in marks)]) or None
    table = Table(
        title=_escape_text(title), title_justify="left", title_style="bold", caption=caption, caption_justify="left"
    )
    table.add_column("")
    for side in sides:
        table.add_column(_escape_text(side), justify="right")
    if compared:
        table.add_column("change", justify="right")
    last = None
    for key in sorted(figures, key=lambda key: suite_order(key[0], key[1])):
        suite, task, metric = key
        shown = describe_metric(suite, task, metric)
        if last is not None and suite_order(suite, task) != last:
            table.add_section()
        last = suite_order(suite, task)
        rows = figures[key]
        cells = [_format_value(rows[side], shown.format_value) if side in rows else "" for side in sides]
        if compared:
            cells.append(_format_change(suite, rows.get(sides[0]), rows.get(sides[-1])))
        table.add_row(_escape_text(_row_label(shown.label, next(iter(rows.values())))), *cells)
        if any(_timing_spread(row) for row in rows.values()):
            ranges = [_format_range(rows.get(side), shown.format_value) for side in sides]
            table.add_row("  lowest to highest", *ranges, *([""] if compared else []), style="dim")
    return table


def _escape_text(text: str) -> str:
    """Escape a text of the record, so that rich does not interpret it as markup."""
    return rich_escape(escape.plain(text))


def _method_and_ratio(record: RunRecord) -> str:
    method = record.method.get("name", "none")
    if record.plan is None:
        return "evaluated as it is (pruner=none)"
    achieved, requested = record.plan["achieved"], record.plan["requested"]
    recovered = f", recovered by {record.recovery['name']}" if record.recovery else ""
    return f"{method}, {achieved['ratio']:.1%} of the {requested['scope']} parameters removed{recovered}"


def _row_label(label: str, row: dict[str, Any]) -> str:
    extra = []
    if row["suite"] == "perplexity":
        extra.append(f"windows of {row['seq_len']}")
    if row["suite"] == "zero_shot" and row.get("n"):
        extra.append(f"n={row['n']}")
    if row.get("num_fewshot"):
        extra.append(f"{row['num_fewshot']}-shot")
    if row.get("limit"):
        extra.append(f"limit {row['limit']}")
    return f"{label} ({', '.join(extra)})" if extra else label


def _format_value(row: dict[str, Any], show: Any) -> str:
    stderr, marks = row.get("stderr"), "".join(note_marks(row))
    return (f"{show(row['value'])} ± {stderr:.3f}" if stderr is not None else show(row["value"])) + marks


def _timing_spread(row: dict[str, Any] | None) -> dict[str, float] | None:
    """Return the spread of repeated timings; None for old records, which do not state it."""
    return ((row or {}).get("detail") or {}).get("spread")


def _format_range(row: dict[str, Any] | None, show: Any) -> str:
    spread = _timing_spread(row)
    return "" if spread is None else f"{show(spread['min'])} to {show(spread['max'])}"


def _format_change(suite: str, before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    if before is None or after is None or not before["value"]:
        return ""
    if suite == "zero_shot":
        return f"{100 * (after['value'] - before['value']):+.1f}"
    ratio = after["value"] / before["value"]
    return f"x{ratio:.2f}"
