"""The per-block figure: how important each block was found, and how much of it was kept."""

from __future__ import annotations

from pathlib import Path

from cfsp.pruning.plan import PruningPlan


def draw_blocks(plan: PruningPlan, metric: str, path: Path) -> Path:
    """Write a PNG: bars for the kept FFN width over the base width, a line for the block distance ``metric``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    blocks = list(range(len(plan.details)))
    figure = Figure(figsize=(max(6.0, 0.28 * len(blocks) + 3), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    widths = figure.subplots()
    widths.bar(blocks, [row["base_width"] for row in plan.details], color="#dfe3e8", label="base width")
    widths.bar(blocks, [row["width"] for row in plan.details], color="#4878a8", label="kept width")
    widths.set(xlabel="block", ylabel="FFN neurons")
    widths.xaxis.set_major_locator(MaxNLocator(integer=True))
    distances = widths.twinx()
    values = [row["distance"][metric] for row in plan.details]
    distances.plot(blocks, values, color="#c2571a", marker="o", markersize=4, label=f"{metric} distance")
    distances.set(ylabel=f"{metric} distance (block importance)", ylim=(0, max(values) * 1.1 or 1))
    handles = [*widths.get_legend_handles_labels()[0], *distances.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    title = f"{plan.method.get('name', '')}: {plan.achieved['ffn_ratio']:.1%} of the FFN parameters removed"
    widths.set_title(title, fontsize=10)
    figure.savefig(path, dpi=150)
    return path
