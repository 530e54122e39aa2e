"""Figures of a run: the importance of each block and its kept share, and the course of a recovery."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cfsp.plan.pruning_plan import PruningPlan

_BASE, _KEPT, _DISTANCE = "#dfe3e8", "#4878a8", "#c2571a"


def draw_blocks(plan: PruningPlan, metric: str, path: Path) -> Path:
    """Draw a PNG of the blocks: bars for kept FFN neurons and KV groups, a line for the block distance.

    Args:
        plan: the plan; KV groups are drawn only where some are removed.
        metric: block distance to draw.
        path: file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = plan.details
    heads = any(row["kv_groups"] != row["base_kv_groups"] for row in rows)
    size = (max(6.0, 0.28 * len(rows) + 3), 5.2 if heads else 3.8)
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    # Margins are set in inches, because a layout engine draws everything twice and a sweep draws many figures.
    margins = {"left": 0.75 / size[0], "right": 1 - 0.75 / size[0], "bottom": 0.5 / size[1], "top": 1 - 0.65 / size[1]}
    figure.subplots_adjust(**margins, hspace=0.12)
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
    figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    scope = plan.requested["scope"].replace("ffn", "FFN")
    title = f"{plan.method.get('name', '')}: {plan.achieved['ratio']:.1%} of the {scope} parameters removed"
    widths.set_title(title, fontsize=10)
    figure.savefig(path, format="png", dpi=150, pil_kwargs={"compress_level": 1})
    return path


def draw_recovery(recovery: dict[str, Any], path: Path) -> Path:
    """Draw a PNG of a recovery: the training loss by step and, where adapters were trained, the rank of each block.

    Args:
        recovery: recovery as the record holds it.
        path: file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    ranks = recovery.get("ranks")
    figure = Figure(figsize=(9.0 if ranks else 5.5, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, 2 if ranks else 1, squeeze=False)
    losses, history = panels[0, 0], recovery["history"]
    losses.plot([row["step"] for row in history], [row["loss"] for row in history], color=_KEPT)
    label = "distillation loss" if recovery["objective"] == "distill" else "loss (nats per token)"
    losses.set(xlabel="step", ylabel=label, title=f"{recovery['name']}: {recovery['tokens']:,} tokens")
    if ranks:
        panels[0, 1].bar(range(len(ranks)), [rank or 0 for rank in ranks], color=_KEPT)
        title = f"{recovery['trainable_parameters']:,} trainable parameters"
        panels[0, 1].set(xlabel="block", ylabel="rank", title=title)
        panels[0, 1].xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[0, 1].yaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[0]:
        axes.title.set_size(10)
    figure.savefig(path, format="png", dpi=150)
    return path


def _bars(axes: Any, base: list[int], kept: list[int], label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.bar(range(len(base)), base, color=_BASE, label="base")
    axes.bar(range(len(kept)), kept, color=_KEPT, label="kept")
    axes.set(ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
