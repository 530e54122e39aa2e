"""Measure overfitting to the calibration windows: their perplexity beside that of held-out text.

    cfsp benchmark calibration_fit                                         the bundled model
    cfsp benchmark calibration_fit --model FOLDER --text FILE --name NAME  a local model and a text

Half of the FFN neurons are removed by three methods: CFSP (which fits nothing), second-order selection with least
squares, and cfsp_plus (Gauss-Newton). Each is measured for several numbers of windows of 256 tokens. The first 60 % of
the lines of --text are for calibration, the rest is held out. Writes
calibration_fit/NAME.json, tables/calibration_fit-NAME.md and figures/calibration_fit-NAME.png and .svg under --results.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from cfsp.evaluation.perplexity import negative_log_likelihood
from cfsp.record import environment
from cfsp.system.package import ROOT

WINDOWS, SEQ_LEN, HELD_OUT, SEEDS, RATIO = (2, 4, 8, 16, 32, 64, 128, 256), 256, 80, (0, 1, 2), 0.5
#: Name of a method -> pruner and overrides.
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cfsp": ("cfsp", ()),
    "obs, coarse, least squares": (
        "one_shot",
        ("importance=obs", "allocator=coarse", "pruner.compensation=least_squares", "pruner.sequential=true"),
    ),
    "cfsp_plus": ("cfsp_plus", ()),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the files, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder; without it the bundled model")
    parser.add_argument("--text", type=Path, help="a text that the model of --model knows")
    parser.add_argument("--name", help="how the model of --model is called in results/")
    parser.add_argument("--round-to", type=int, default=32, help="kept widths are multiples of it")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of the calibration windows")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    if (options.model is None) != (options.text is None) or (options.model is None) != (options.name is None):
        parser.error("--model, --text and --name belong together")
    record = measure(options)
    write_files(record, options.results)
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a row for each seed, number of windows and method, and return the record."""
    import torch

    import cfsp

    assets = ROOT / "assets"
    model, tokenizer = cfsp.load(options.model or assets / "books7m", dtype="float32")
    if options.text is None:
        texts = [
            (assets / "text" / f"{half}.txt").read_text(encoding="utf-8") for half in ("calibration", "evaluation")
        ]
    else:
        lines = options.text.read_text(encoding="utf-8").splitlines(keepends=True)
        cut = len(lines) * 6 // 10
        texts = ["".join(lines[:cut]), "".join(lines[cut:])]
    calibration, held_out = (torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    n = min(HELD_OUT, len(held_out) // SEQ_LEN)
    test = held_out[: n * SEQ_LEN].view(n, SEQ_LEN)
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        starts = torch.randint(
            len(calibration) - SEQ_LEN, (max(WINDOWS),), generator=torch.Generator().manual_seed(seed)
        )
        windows = torch.stack([calibration[start : start + SEQ_LEN] for start in starts])
        for number in WINDOWS:
            ids = windows[:number]
            for method, (pruner, overrides) in METHODS.items():
                plan = cfsp.prune(
                    model, ids, pruner, RATIO, scope="ffn", round_to=options.round_to, overrides=overrides
                )
                values = measure_perplexities(model, plan, ids, test)
                rows.append({"method": method, "windows": number, "seed": seed, **values})
                print(f"seed {seed}, {number} windows, {method}: {values}", file=sys.stderr, flush=True)
    dense = {"held_out": measure_perplexity(model, test)}
    name = options.name or "books7m"
    return {
        "name": name,
        "made_by": "cfsp benchmark calibration_fit"
        + (f" --model {options.model} --text {options.text} --name {name}" if options.model else "")
        + (f" --round-to {options.round_to}" if options.round_to != 32 else ""),
        "ratio": RATIO,
        "round_to": options.round_to,
        "seq_len": SEQ_LEN,
        "held_out_windows": n,
        "dense": dense,
        "rows": rows,
        "environment": environment.describe(),
    }


def measure_perplexities(model: Any, plan: Any, ids: Any, test: Any) -> dict[str, float]:
    """Return the perplexities of the pruned model on its calibration windows and on held-out ones."""
    # Start-up time: loads torch.
    import cfsp
    from cfsp.model.snapshot import restored

    with restored(model):
        cfsp.apply(model, plan)
        return {"calibration": measure_perplexity(model, ids), "held_out": measure_perplexity(model, test)}


def measure_perplexity(model: Any, windows: Any) -> float:
    """Return exp of the mean negative log-likelihood per predicted token."""
    total, count = negative_log_likelihood(model, windows, 8, "windows")
    return math.exp(total / count)


def write_files(record: dict[str, Any], results: Path) -> None:
    """Write the record, the table and the figure."""
    name = record["name"]
    files = {results / "calibration_fit" / f"{name}.json": (json.dumps(record, indent=2) + "\n").encode()}
    files[results / "tables" / f"calibration_fit-{name}.md"] = render_table(record).encode()
    for ending, content in draw_figure(record).items():
        files[results / "figures" / f"calibration_fit-{name}.{ending}"] = content
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    print(render_table(record))


def mean_perplexities(record: dict[str, Any], method: str, side: str) -> list[float]:
    """Return the mean over the seeds for each number of windows."""
    rows = [row for row in record["rows"] if row["method"] == method]
    return [mean(row[side] for row in rows if row["windows"] == number) for number in WINDOWS]


def render_table(record: dict[str, Any]) -> str:
    """Render the table as Markdown, with held-out and calibration perplexity in each cell."""
    lines = [f"### Calibration against held-out perplexity: {record['name']}", ""]
    lines += ["| windows | " + " | ".join(METHODS) + " |", "| --: |" + " --: |" * len(METHODS)]
    columns = [
        [
            f"{held:.2f} ({own:.2f})"
            for held, own in zip(
                mean_perplexities(record, m, "held_out"), mean_perplexities(record, m, "calibration"), strict=True
            )
        ]
        for m in METHODS
    ]
    lines += [
        f"| {number} | " + " | ".join(row) + " |"
        for number, row in zip(WINDOWS, zip(*columns, strict=True), strict=True)
    ]
    git = record["environment"]["git"]
    seeds = ", ".join(map(str, sorted({row["seed"] for row in record["rows"]})))
    lines += [
        "",
        f"Held-out perplexity, in brackets that on the calibration windows; {record['ratio']:.0%} of the FFN neurons "
        f"removed, round_to {record['round_to']}, windows of {record['seq_len']} tokens, means over the seeds {seeds}; "
        f"dense, held out: {record['dense']['held_out']:.2f} ({record['held_out_windows']} windows).  ",
        f"Commit: {git['commit'][:12] if git else 'an installed wheel'}{'+changes' if git and git['dirty'] else ''}.  ",
        f"Made by: {record['made_by']}",
    ]
    return "\n".join(lines) + "\n"


def draw_figure(record: dict[str, Any]) -> dict[str, bytes]:
    """Draw the figure as PNG and SVG; return file ending -> content.

    Full lines show held-out perplexities, dashed lines those of the calibration windows.
    """
    import io

    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: Any = {"font.family": "DejaVu Sans", "svg.hashsalt": "cfsp", "svg.fonttype": "path", "font.size": 9}
    files = {}
    with matplotlib.rc_context(settings):
        drawn = Figure(figsize=(6.4, 4.2), layout="constrained")
        FigureCanvasAgg(drawn)
        axes = drawn.subplots()
        for colour, method in zip(("#1f5a96", "#c2571a", "#2e8b57"), METHODS, strict=True):
            axes.plot(
                WINDOWS,
                mean_perplexities(record, method, "held_out"),
                color=colour,
                marker="o",
                markersize=4,
                label=method,
            )
            axes.plot(
                WINDOWS, mean_perplexities(record, method, "calibration"), color=colour, linestyle="--", linewidth=1
            )
        axes.axhline(record["dense"]["held_out"], color="black", linewidth=0.8, label="dense, held out")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(xlabel="calibration windows", ylabel="perplexity (lower is better)")
        axes.set_title(f"{record['name']}: held out (full), on the calibration windows (dashed)", fontsize=9)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=7)
        for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            stream = io.BytesIO()
            drawn.savefig(stream, format=ending, dpi=150, metadata=metadata)
            files[ending] = stream.getvalue()
    return files


if __name__ == "__main__":
    sys.exit(main())
