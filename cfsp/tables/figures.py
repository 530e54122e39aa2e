"""Figures of an experiment as PNG and SVG. The same records and pinned versions give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from cfsp.errors import ConfigError
from cfsp.system import escape
from cfsp.system.names import RULE, is_name
from cfsp.tables.collection import RecordedRun
from cfsp.tables.grid import check_nothing_hidden, group_by, select_runs
from cfsp.tables.layout import FigureLayout
from cfsp.tables.run_figures import column_value, select_column
from cfsp.tables.table import Column

_COLOURS = (
    "#1f5a96", "#c2571a", "#2e8b57", "#8e44ad", "#b03a3a", "#7a6a1f", "#d1749f",
    "#4f9ea8", "#6b6b6b", "#9bbb59", "#30408f", "#e0a030", "#104030",
)  # fmt: skip
_MARKERS = "osD^vP*XphH<>"


def draw_figure(name: str, layout: FigureLayout, runs: Sequence[RecordedRun]) -> dict[str, bytes]:
    """Draw a figure and return file name -> content.

    Args:
        name: name of the figure in its layout.
        layout: layout of the figure.
        runs: the runs with a record, in the order of the grid.

    Raises:
        ConfigError: a key is missing, no record has the figures to be shown, or runs would hide each other.
    """
    parts = group_by(select_runs(name, layout.where, runs), layout.each)
    files: dict[str, bytes] = {}
    for values, members in parts.items():
        file = "-".join([name, *(values if len(parts) > 1 else ())])
        if not is_name(file):
            shown = ", ".join(f"{key}={value}" for key, value in zip(layout.each, values, strict=True))
            raise ConfigError(f"{name}: {shown}: {RULE}; choose one value of it on the command line")
        files |= {f"{file}.{ending}": content for ending, content in _draw_files(name, layout, members).items()}
    return files


def _draw_files(name: str, layout: FigureLayout, runs: Sequence[RecordedRun]) -> dict[str, bytes]:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Matplotlib's own fonts, a fixed salt for ids and no date: the bytes depend neither on the machine nor on the day.
    with matplotlib.rc_context(
        {"font.family": "DejaVu Sans", "svg.hashsalt": "cfsp", "svg.fonttype": "path", "axes.spines.top": False,
         "axes.spines.right": False, "font.size": 9}
    ):  # fmt: skip
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        {"curve": _draw_curve, "pareto": _draw_pareto, "blocks": _draw_blocks}[layout.kind](figure, name, layout, runs)
        files = {}
        for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            stream = io.BytesIO()
            figure.savefig(stream, format=ending, dpi=150, metadata=metadata)
            files[ending] = stream.getvalue()
    return files


def _draw_curve(figure: Any, name: str, layout: FigureLayout, runs: Sequence[RecordedRun]) -> None:
    """Draw the mean over the seeds as a line, and the range from the lowest to the highest value as a band."""
    x, column = (
        _require_value(name, "x", layout.x),
        select_column(name, _require_value(name, "metric", layout.metric), runs),
    )
    check_nothing_hidden(name, [*layout.lines, x], runs)
    axes = figure.subplots()
    dense = next((value for run in runs if (value := column_value(run.record, column, "dense")) is not None), None)
    if dense is not None:
        axes.axhline(dense, color="black", linewidth=0.8, linestyle="--", label="dense")
    for at, (label, members) in enumerate(_group_by_label(runs, layout.lines).items()):
        by_x: dict[float, list[float]] = {}
        for run in members:
            value = column_value(run.record, column)
            if value is not None:
                by_x.setdefault(float(run.cell.point[x]), []).append(value)
        places = sorted(by_x)
        means = [sum(by_x[place]) / len(by_x[place]) for place in places]
        axes.plot(places, means, **_line_style(at), label=escape.figure(label))
        lowest, highest = [min(by_x[place]) for place in places], [max(by_x[place]) for place in places]
        axes.fill_between(places, lowest, highest, color=_line_style(at)["color"], alpha=0.15)
    _label_axes(axes, layout, x, column)


def _draw_pareto(figure: Any, name: str, layout: FigureLayout, runs: Sequence[RecordedRun]) -> None:
    """Draw one metric against another. Lines connect the points in the order of the grid."""
    across = select_column(name, _require_value(name, "x_metric", layout.x_metric), runs)
    column = select_column(name, _require_value(name, "metric", layout.metric), runs)
    axes = figure.subplots()
    pairs = [(column_value(run.record, across, "dense"), column_value(run.record, column, "dense")) for run in runs]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    if known:
        axes.plot(
            sum(a for a, _ in known) / len(known), known[0][1], marker="*", markersize=12, color="black", linestyle="",
            label="dense",
        )  # fmt: skip
    for at, (label, members) in enumerate(_group_by_label(runs, layout.lines).items()):
        points = [
            (a, b)
            for run in members
            if (a := column_value(run.record, across)) is not None
            and (b := column_value(run.record, column)) is not None
        ]
        axes.plot([a for a, _ in points], [b for _, b in points], **_line_style(at), label=escape.figure(label))
    _label_axes(axes, layout, across.metric.label, column)


def _draw_blocks(figure: Any, name: str, layout: FigureLayout, runs: Sequence[RecordedRun]) -> None:
    """Draw the kept share of neurons (bars) and the angular distance (line) of each block, for the first seed."""
    check_nothing_hidden(name, layout.panels, runs)
    panels = {label: members[0] for label, members in _group_by_label(runs, layout.panels).items()}
    figure.set_size_inches(6.4, 1.7 * len(panels) + 0.6)
    for axes, (label, run) in zip(
        figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels.items(), strict=True
    ):
        rows = run.record.blocks
        if not rows:
            raise ConfigError(f"{name}: {run.record.run_id} has no blocks to show; leave it out with where")
        axes.bar(range(len(rows)), [row["width"] / row["base_width"] for row in rows], color="#9db8d6")
        axes.set(ylim=(0, 1.05), ylabel="kept", title=escape.figure(label))
        distances = axes.twinx()
        distances.plot(
            range(len(rows)), [row["distance"]["angular"] for row in rows], color="#c2571a", marker="o", markersize=3
        )
        distances.set_ylim(bottom=0)
        distances.set_ylabel("distance", color="#c2571a")
    axes.set_xlabel("block")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(escape.figure(layout.caption), fontsize=9)


def _group_by_label(runs: Sequence[RecordedRun], keys: Sequence[str]) -> dict[str, list[RecordedRun]]:
    return {", ".join(values): members for values, members in group_by(runs, keys).items()}


def _line_style(index: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4,
        "linewidth": 1.2,
    }


def _label_axes(axes: Any, layout: FigureLayout, across: str, column: Column) -> None:
    better = {1: " (higher is better)", -1: " (lower is better)", 0: ""}[column.metric.better]
    axes.set(xlabel=escape.figure(across), ylabel=escape.figure(column.metric.label + better))
    axes.set_title(escape.figure(layout.caption), fontsize=9)
    if layout.log:
        axes.set_yscale("log")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=7, ncols=2)


def _require_value(name: str, key: str, value: str | None) -> str:
    if value is None:
        raise ConfigError(f"{name}: {key} is not set, this kind of figure needs it")
    return value
