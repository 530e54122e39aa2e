"""The table at the end of a run, dense beside pruned."""

from __future__ import annotations

from typing import Any

from rich.markup import escape as rich_escape
from rich.table import Table

from cfsp.record.run_record import RunRecord
from cfsp.system import escape
from cfsp.tables.metrics import NOTES, describe, notes_of, order


def summary(record: RunRecord) -> Table | None:
    """Return a rich table of every figure of the run; None where nothing was measured."""
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
    marks = {mark for rows in figures.values() for row in rows.values() for mark in notes_of(row)}
    caption = "\n".join([*explained, *(f"{mark} {NOTES[mark]}" for mark in NOTES if mark in marks)]) or None
    table = Table(title=_text(title), title_justify="left", title_style="bold", caption=caption, caption_justify="left")
    table.add_column("")
    for side in sides:
        table.add_column(_text(side), justify="right")
    if compared:
        table.add_column("change", justify="right")
    last = None
    for key in sorted(figures, key=lambda key: order(key[0], key[1])):
        suite, task, metric = key
        shown = describe(suite, task, metric)
        if last is not None and order(suite, task) != last:
            table.add_section()
        last = order(suite, task)
        rows = figures[key]
        cells = [_cell(rows[side], shown.show) if side in rows else "" for side in sides]
        if compared:
            cells.append(_change(suite, rows.get(sides[0]), rows.get(sides[-1])))
        table.add_row(_text(_label(shown.label, next(iter(rows.values())))), *cells)
        if any(_spread(row) for row in rows.values()):
            ranges = [_range(rows.get(side), shown.show) for side in sides]
            table.add_row("  lowest to highest", *ranges, *([""] if compared else []), style="dim")
    return table


def _text(text: str) -> str:
    """Escape a text of the record, so that rich reads no markup in it."""
    return rich_escape(escape.plain(text))


def _method_and_ratio(record: RunRecord) -> str:
    method = record.method.get("name", "none")
    if record.plan is None:
        return "evaluated as it is (pruner=none)"
    achieved, requested = record.plan["achieved"], record.plan["requested"]
    recovered = f", recovered by {record.recovery['name']}" if record.recovery else ""
    return f"{method}, {achieved['ratio']:.1%} of the {requested['scope']} parameters removed{recovered}"


def _label(label: str, row: dict[str, Any]) -> str:
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


def _cell(row: dict[str, Any], show: Any) -> str:
    stderr, marks = row.get("stderr"), "".join(notes_of(row))
    return (f"{show(row['value'])} ± {stderr:.3f}" if stderr is not None else show(row["value"])) + marks


def _spread(row: dict[str, Any] | None) -> dict[str, float] | None:
    """Return the spread of repeated timings. Records from before it was kept have none."""
    return ((row or {}).get("detail") or {}).get("spread")


def _range(row: dict[str, Any] | None, show: Any) -> str:
    spread = _spread(row)
    return "" if spread is None else f"{show(spread['min'])} to {show(spread['max'])}"


def _change(suite: str, before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    if before is None or after is None or not before["value"]:
        return ""
    if suite == "zero_shot":
        return f"{100 * (after['value'] - before['value']):+.1f}"
    ratio = after["value"] / before["value"]
    return f"x{ratio:.2f}"
