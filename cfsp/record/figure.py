"""The per-block figure: how important each block was found, and how much of it was kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cfsp.pruning.plan import PruningPlan

_BASE, _KEPT, _DISTANCE = "#dfe3e8", "#4878a8", "#c2571a"


def draw_blocks(plan: PruningPlan, metric: str, path: Path) -> Path:
    """Write a PNG: bars for kept FFN neurons, and KV groups where any go; a line for the block distance ``metric``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = plan.details
    heads = any(row["kv_groups"] != row["base_kv_groups"] for row in rows)
    size = (max(6.0, 0.28 * len(rows) + 3), 5.2 if heads else 3.8)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1 + heads, 1, sharex=True, squeeze=False, height_ratios=[2, 1][: 1 + heads])
    widths = panels[0, 0]
    _bars(widths, [row["base_width"] for row in rows], [row["width"] for row in rows], "FFN neurons")
    distances = widths.twinx()
    values = [row["distance"][metric] for row in rows]
    distances.plot(range(len(rows)), values, color=_DISTANCE, marker="o", markersize=4, label=f"{metric} distance")
    distances.set(ylabel=f"{metric} distance (block importance)", ylim=(0, max(values) * 1.1 or 1))
    if heads:
        _bars(panels[1, 0], [row["base_kv_groups"] for row in rows], [row["kv_groups"] for row in rows], "KV groups")
    panels[-1, 0].set(xlabel="block")
    handles = [*widths.get_legend_handles_labels()[0], *distances.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    scope = plan.requested["scope"].replace("ffn", "FFN")
    title = f"{plan.method.get('name', '')}: {plan.achieved['ratio']:.1%} of the {scope} parameters removed"
    widths.set_title(title, fontsize=10)
    figure.savefig(path, dpi=150)
    return path


def _bars(axes: Any, base: list[int], kept: list[int], label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.bar(range(len(base)), base, color=_BASE, label="base")
    axes.bar(range(len(kept)), kept, color=_KEPT, label="kept")
    axes.set(ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
