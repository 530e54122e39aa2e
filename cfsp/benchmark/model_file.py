"""Measure what pruning and the evaluation of perplexity cost on a model of yours, beside its bare forward passes.

    cfsp benchmark model_file --model FOLDER_OR_FILE.gguf [--windows 64] [--seq-len 1024] [--repeats 3] [--name NAME]

Two ratios, each of times taken in alternation over the same random tokens: ``cfsp.prune`` (calibration, scoring,
planning) beside the decoder's forward pass without LM head, and the perplexity as ``evaluation=perplexity`` computes
it beside the forward pass with LM head, each pass at its own best batch size. With the peak memory of both. Writes
benchmarks/model_file_NAME.json and tables/benchmark_model_file_NAME.md under --results. Exit codes: 0 both limits
hold, 1 one is missed, 2 wrong input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from cfsp.benchmark import calibration
from cfsp.benchmark.alternation import alternated, pairwise
from cfsp.benchmark.part import Check, Result, Settings, markdown, span, write
from cfsp.benchmark.shapes import random_ids
from cfsp.config.compose import compose
from cfsp.errors import CfspError
from cfsp.evaluation.cost import measure_peak_besides_weights
from cfsp.evaluation.perplexity import negative_log_likelihood

if TYPE_CHECKING:
    from torch import Tensor

#: Largest time of the perplexity, in forward passes with LM head.
PERPLEXITY_LIMIT = 1.03
#: Windows over which the perplexity is timed: its cost is the same for each.
PERPLEXITY_WINDOWS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the files; returns the exit code."""
    parser = argparse.ArgumentParser(
        "cfsp benchmark model_file", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a model folder, a GGUF file or a repository of the hub")
    parser.add_argument("--name", help="how it is called in results/; the default is the name of the file or folder")
    parser.add_argument("--windows", type=_positive, default=64, help="windows of the calibration set")
    parser.add_argument("--seq-len", type=_positive, default=1024, help="tokens of a window")
    parser.add_argument("--repeats", type=_positive, default=3, help="how often each is timed")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmark"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    try:
        result = measure(options)
    except CfspError as error:
        print(f"cfsp benchmark model_file: {error}", file=sys.stderr)
        return error.exit_code
    text = table(result)
    write(result, text, Settings(repeats=options.repeats, results=options.results))
    print(text)
    return 0 if all(check.met for check in result.checks) else 1


def measure(options: argparse.Namespace) -> Result:
    """Measure a row for pruning and a row for the perplexity."""
    import cfsp

    model, _ = cfsp.load(options.model, dtype=options.dtype, device=options.device)
    name = options.name or Path(options.model).stem
    arguments = (
        f"model_file --model {options.model} --windows {options.windows} --seq-len {options.seq_len} "
        f"--repeats {options.repeats} --dtype {options.dtype}"
    )
    result = Result(f"model_file_{name}", arguments)
    ids = random_ids(options.windows, options.seq_len, model.config.vocab_size)
    about = {"model": name, "dtype": options.dtype, "device": model.device.type}
    tried = calibration.tried_batches(model, ids)
    batch = min(tried, key=lambda size: tried[size])
    settings = Settings(repeats=options.repeats, work=options.work)
    pruning = calibration.compared(model, ids, batch, settings, stages_alone=False)
    peaks = pruning["peak_beside_weights"]
    result.rows.append(
        {
            **about, "what": "prune", "windows": len(ids), "seq_len": options.seq_len, "bare_batch_size": batch,
            "batch_size": batch, "tried_batch_sizes": tried, **pruning,
            "peak_bytes": {"bare": peaks["bare"], "ours": max(peaks[stage] for stage in ("calibrate", "plan"))},
        }
    )  # fmt: skip
    result.rows.append(about | perplexity_row(model, ids[:PERPLEXITY_WINDOWS], options.repeats))
    for row, limit in zip(result.rows, (calibration.LIMIT, PERPLEXITY_LIMIT), strict=True):
        result.checks.append(Check(f"{row['what']} / bare forward", row["ratio"], limit))
    return result


def perplexity_row(model: Any, ids: Tensor, repeats: int) -> dict[str, Any]:
    """Time the perplexity, at the batch size of its preset, beside the forward pass with head at its best one."""
    batch = int(compose(["evaluation=perplexity"]).evaluation.perplexity.batch_size)
    passes: dict[int, Callable[[], object]] = {
        size: partial(with_head, model, ids, size) for size in (1, 2, 4, 8) if size <= len(ids)
    }
    with_head(model, ids[:1], 1)
    cuda = model.device.type == "cuda"
    tried = alternated({str(size): call for size, call in passes.items()}, 2, cuda)
    best = min(passes, key=lambda size: min(tried[str(size)]))

    def ours() -> object:
        return negative_log_likelihood(model, ids, batch, "benchmark")

    seconds = alternated({"bare": passes[best], "ours": ours}, repeats, cuda)
    ratio, ratios = pairwise(seconds["ours"], seconds["bare"])
    weights, on_device = [*model.parameters(), *model.buffers()], ids.to(model.device)
    return {
        "what": "perplexity",
        "windows": len(ids),
        "seq_len": ids.shape[1],
        "bare_batch_size": best,
        "batch_size": batch,
        "tried_batch_sizes": {size: min(values) / len(ids) for size, values in tried.items()},
        "seconds": seconds,
        "ratio": ratio,
        "ratios": ratios,
        "peak_bytes": {
            "bare": measure_peak_besides_weights(weights, on_device, partial(with_head, model, on_device, best)),
            "ours": measure_peak_besides_weights(
                weights, on_device, lambda: negative_log_likelihood(model, on_device, batch, "benchmark")
            ),
        },
    }


def with_head(model: Any, ids: Tensor, batch_size: int) -> None:
    """Run the forward pass that the perplexity is measured against: logits of all tokens, and nothing else."""
    import torch

    with torch.no_grad():
        for batch in ids.split(batch_size):
            model(batch.to(model.device), use_cache=False)


def table(result: Result) -> str:
    """Render the table as Markdown."""
    head = [
        "what", "tokens", "batch: bare, ours", "bare forward, s", "ours, s", "ratio (lowest to highest)",
        "bare, MiB", "ours, MiB",
    ]  # fmt: skip
    rows = [
        [
            f"{row['what']}, {row['dtype']}, {row['device']}",
            f"{row['windows']} x {row['seq_len']}",
            f"{row['bare_batch_size']}, {row['batch_size']}",
            f"{median(row['seconds']['bare']):.2f}",
            f"{median(row['seconds']['ours']):.2f}",
            f"**{row['ratio']:.3f}** ({span(row['ratios'], 3)})",
            *(f"{row['peak_bytes'][side] / 2**20:,.0f}" for side in ("bare", "ours")),
        ]
        for row in result.rows
    ]
    explained = (
        f"{result.rows[0]['model']}. prune: cfsp.prune at {calibration.RATIO:.0%} of the FFN neurons beside the "
        "forward pass of the decoder without LM head. perplexity: the NLL of the windows beside the forward pass with "
        "LM head. "
        "Both in alternation over the same random tokens; medians; ratio: median of the pairs' ratios; the bare pass "
        "at the best of its batch sizes. MiB: most bytes of tensors alive beside the weights (for prune over two "
        "batches)."
    )
    return markdown("Cost on a model file", head, rows, result, explained)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    sys.exit(main())
