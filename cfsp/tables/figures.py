"""Figures of an experiment, PNG and SVG: the same bytes from the same records and the pinned versions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from cfsp.errors import ConfigError
from cfsp.system import escape
from cfsp.system.names import RULE, is_name
from cfsp.tables.collection import RecordedRun
from cfsp.tables.grid import check_nothing_hidden, group_by, select
from cfsp.tables.layout import FigureLayout
from cfsp.tables.run_figures import column_of, value_of
from cfsp.tables.table import Column

_COLOURS = (
    "#1f5a96", "#c2571a", "#2e8b57", "#8e44ad", "#b03a3a", "#7a6a1f", "#d1749f",
    "#4f9ea8", "#6b6b6b", "#9bbb59", "#30408f", "#e0a030", "#104030",
)  # fmt: skip
_MARKERS = "osD^vP*XphH<>"


def draw(name: str, layout: FigureLayout, runs: Sequence[RecordedRun]) -> dict[str, bytes]:
    """Draw a figure; returns the content of each file by its name.

    Args:
        name: name of the figure in its layout.
        layout: what it shows.
        runs: the runs with a record, in the order of the grid.

    Raises:
        ConfigError: a key is missing, no record has the figures to be shown, or runs would hide each other.
    """
    parts = group_by(select(name, layout.where, runs), layout.each)
    files: dict[str, bytes] = {}
    for values, members in parts.items():
        file = "-".join([name, *(values if len(parts) > 1 else ())])
        if not is_name(file):
            shown = ", ".join(f"{key}={value}" for key, value in zip(layout.each, values, strict=True))
            raise ConfigError(f"{name}: {shown}: {RULE}; choose one value of it on the command line")
        files |= {f"{file}.{ending}": content for ending, content in _files(name, layout, members).items()}
    return files


def _files(name: str, layout: FigureLayout, runs: Sequence[RecordedRun]) -> dict[str, bytes]:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The fonts come with matplotlib, ids have a fixed salt, and no date is written, so that the bytes depend
    # neither on the machine nor on the day.
    with matplotlib.rc_context(
        {"font.family": "DejaVu Sans", "svg.hashsalt": "cfsp", "svg.fonttype": "path", "axes.spines.top": False,
         "axes.spines.right": False, "font.size": 9}
    ):  # fmt: skip
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        {"curve": _curve, "pareto": _pareto, "blocks": _blocks}[layout.kind](figure, name, layout, runs)
        files = {}
        for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            stream = io.BytesIO()
            figure.savefig(stream, format=ending, dpi=150, metadata=metadata)
            files[ending] = stream.getvalue()
    return files


def _curve(figure: Any, name: str, layout: FigureLayout, runs: Sequence[RecordedRun]) -> None:
    """Draw the mean over seeds, in a band from the lowest to the highest value."""
    x, column = _needed(name, "x", layout.x), column_of(name, _needed(name, "metric", layout.metric), runs)
    check_nothing_hidden(name, [*layout.lines, x], runs)
    axes = figure.subplots()
    dense = next((value for run in runs if (value := value_of(run.record, column, "dense")) is not None), None)
    if dense is not None:
        axes.axhline(dense, color="black", linewidth=0.8, linestyle="--", label="dense")
    for at, (label, members) in enumerate(_labelled(runs, layout.lines).items()):
        by_x: dict[float, list[float]] = {}
        for run in members:
            value = value_of(run.record, column)
            if value is not None:
                by_x.setdefault(float(run.cell.point[x]), []).append(value)
        places = sorted(by_x)
        means = [sum(by_x[place]) / len(by_x[place]) for place in places]
        axes.plot(places, means, **_style(at), label=escape.figure(label))
        lowest, highest = [min(by_x[place]) for place in places], [max(by_x[place]) for place in places]
        axes.fill_between(places, lowest, highest, color=_style(at)["color"], alpha=0.15)
    _finish(axes, layout, x, column)


def _pareto(figure: Any, name: str, layout: FigureLayout, runs: Sequence[RecordedRun]) -> None:
    """Draw one metric against another. Points are joined in the order of the grid."""
    across = column_of(name, _needed(name, "x_metric", layout.x_metric), runs)
    column = column_of(name, _needed(name, "metric", layout.metric), runs)
    axes = figure.subplots()
    pairs = [(value_of(run.record, across, "dense"), value_of(run.record, column, "dense")) for run in runs]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    if known:
        axes.plot(
            sum(a for a, _ in known) / len(known), known[0][1], marker="*", markersize=12, color="black", linestyle="",
            label="dense",
        )  # fmt: skip
    for at, (label, members) in enumerate(_labelled(runs, layout.lines).items()):
        points = [
            (a, b)
            for run in members
            if (a := value_of(run.record, across)) is not None and (b := value_of(run.record, column)) is not None
        ]
        axes.plot([a for a, _ in points], [b for _, b in points], **_style(at), label=escape.figure(label))
    _finish(axes, layout, across.metric.label, column)


def _blocks(figure: Any, name: str, layout: FigureLayout, runs: Sequence[RecordedRun]) -> None:
    """Draw the first seed: bars for the kept share of each block's neurons, a line for its angular distance."""
    check_nothing_hidden(name, layout.panels, runs)
    panels = {label: members[0] for label, members in _labelled(runs, layout.panels).items()}
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


def _labelled(runs: Sequence[RecordedRun], keys: Sequence[str]) -> dict[str, list[RecordedRun]]:
    return {", ".join(values): members for values, members in group_by(runs, keys).items()}


def _style(at: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[at % len(_COLOURS)],
        "marker": _MARKERS[at % len(_MARKERS)],
        "markersize": 4,
        "linewidth": 1.2,
    }


def _finish(axes: Any, layout: FigureLayout, across: str, column: Column) -> None:
    better = {1: " (higher is better)", -1: " (lower is better)", 0: ""}[column.metric.better]
    axes.set(xlabel=escape.figure(across), ylabel=escape.figure(column.metric.label + better))
    axes.set_title(escape.figure(layout.caption), fontsize=9)
    if layout.log:
        axes.set_yscale("log")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=7, ncols=2)


def _needed(name: str, key: str, value: str | None) -> str:
    if value is None:
        raise ConfigError(f"{name}: {key} is not set, this kind of figure needs it")
    return value
