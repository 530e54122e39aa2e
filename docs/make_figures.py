"""Draw the figure of the README: dense model, block distances, kept neurons, smaller model.

    python docs/make_figures.py [FILE]

The bundled model is pruned by half with ``pruner=cfsp`` on the bundled calibration prose; every number in the figure
is read from that plan. Without FILE the committed docs/figures/overview.png is written again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

import cfsp

HERE = Path(__file__).resolve().parent
ASSETS = Path(cfsp.__file__).resolve().parent / "assets"
#: Windows and tokens of a window, as in calibration=bundled.
WINDOWS, LENGTH = 48, 256
_REMOVED, _KEPT, _DISTANCE = "#dfe3e8", "#4878a8", "#c2571a"


def plan_of_the_bundled_model(windows: int = WINDOWS) -> cfsp.PruningPlan:
    """Return the plan that removes half of the FFN neurons of the bundled model."""
    model, tokenizer = cfsp.load(ASSETS / "books7m", device="cpu")
    text = (ASSETS / "text" / "calibration.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    starts = np.linspace(0, len(ids) - LENGTH, windows).astype(int)
    return cfsp.prune(model, [ids[start : start + LENGTH] for start in starts], pruner="cfsp", ratio=0.5, scope="ffn")


def draw(plan: cfsp.PruningPlan, path: Path) -> Path:
    """Write the figure of ``plan`` as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    rows = plan.details
    blocks = range(len(rows))
    figure = Figure(figsize=(12, 3.1), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, 4, width_ratios=[1, 1.5, 1, 0.8])

    distance = panels[0]
    distance.barh(blocks, [row["distance"]["angular"] for row in rows], color=_DISTANCE)
    distance.set(title="1. How far does a block move\nthe hidden state?", xlabel="angular distance", ylabel="block")

    neurons = panels[1]
    width = max(row["base_width"] for row in rows)
    kept = np.zeros((len(rows), width))
    for index, block in enumerate(plan.blocks):
        kept[index, list(block.ffn_kept) if block.ffn_kept is not None else slice(None)] = 1
    neurons.imshow(kept, aspect="auto", interpolation="nearest", cmap=ListedColormap([_REMOVED, _KEPT]))
    neurons.set(title="2. Which of its FFN neurons matter?\n(blue: kept)", xlabel="neuron")

    widths = panels[2]
    widths.barh(blocks, [row["base_width"] for row in rows], color=_REMOVED)
    widths.barh(blocks, [row["width"] for row in rows], color=_KEPT)
    widths.set(title="3. Slice: each block\nhas its own width", xlabel="FFN neurons")

    for panel in panels[:3]:
        panel.set(yticks=list(blocks), ylim=(len(rows) - 0.5, -0.5))

    model = panels[3]
    before, after = plan.parameters["before"] / 1e6, plan.parameters["after"] / 1e6
    bars = model.bar(["dense", "pruned"], [before, after], color=[_REMOVED, _KEPT])
    model.bar_label(bars, [f"{value:.2f} M" for value in (before, after)])
    model.set(title="4. A model that is\nreally smaller", ylabel="parameters (millions)", ylim=(0, before * 1.15))
    for panel in panels:
        panel.title.set_fontsize(10)
        panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def main() -> None:
    """Write the figure and say where."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "figures" / "overview.png"
    print(f"Written: {draw(plan_of_the_bundled_model(), path)}")


if __name__ == "__main__":
    main()
