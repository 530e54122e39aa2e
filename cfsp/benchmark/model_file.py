"""Measure the cost of pruning and of the perplexity on your own model, beside its bare forward passes.

    cfsp benchmark model_file --model FOLDER_OR_FILE.gguf [--windows 64] [--seq-len 1024] [--repeats 3] [--name NAME]

Measures two ratios of times, taken in alternation over the same random tokens, and the peak memory. The first compares
``cfsp.prune`` (calibration, scoring, planning) with the forward pass of the decoder without LM head. The second
compares the perplexity of ``evaluation=perplexity`` with the forward pass with LM head. Each forward pass uses its best
batch size. Writes benchmarks/model_file_NAME.json and tables/benchmark_model_file_NAME.md under --results. Exit codes:
0 both limits hold, 1 a limit is missed, 2 wrong input.
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
from cfsp.benchmark.alternation import paired_ratios, time_in_alternation
from cfsp.benchmark.part import Check, Result, Settings, format_range, markdown_table, write_result
from cfsp.benchmark.shapes import draw_token_ids
from cfsp.config.compose import compose
from cfsp.errors import CfspError
from cfsp.evaluation.cost import measure_peak_besides_weights
from cfsp.evaluation.perplexity import negative_log_likelihood

if TYPE_CHECKING:
    from torch import Tensor

#: Largest cost of the perplexity, in forward passes with LM head.
PERPLEXITY_LIMIT = 1.03
#: Number of windows over which the perplexity is timed. Its cost is the same for every window.
PERPLEXITY_WINDOWS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the files, and return the exit code."""
    parser = argparse.ArgumentParser(
        "cfsp benchmark model_file", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a model folder, a GGUF file or a repository of the hub")
    parser.add_argument("--name", help="how it is called in results/; the default is the name of the file or folder")
    parser.add_argument("--windows", type=_positive_number, default=64, help="windows of the calibration set")
    parser.add_argument("--seq-len", type=_positive_number, default=1024, help="tokens of a window")
    parser.add_argument("--repeats", type=_positive_number, default=3, help="how often each is timed")
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
    text = render_table(result)
    write_result(result, text, Settings(repeats=options.repeats, results=options.results))
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
    ids = draw_token_ids(options.windows, options.seq_len, model.config.vocab_size)
    about = {"model": name, "dtype": options.dtype, "device": model.device.type}
    tried = calibration.time_batch_sizes(model, ids)
    batch = min(tried, key=lambda size: tried[size])
    settings = Settings(repeats=options.repeats, work=options.work)
    pruning = calibration.compare_with_forward(model, ids, batch, settings, stages_alone=False)
    peaks = pruning["peak_beside_weights"]
    result.rows.append(
        {
            **about, "what": "prune", "windows": len(ids), "seq_len": options.seq_len, "bare_batch_size": batch,
            "batch_size": batch, "tried_batch_sizes": tried, **pruning,
            "peak_bytes": {"bare": peaks["bare"], "ours": max(peaks[stage] for stage in ("calibrate", "plan"))},
        }
    )  # fmt: skip
    result.rows.append(about | measure_perplexity(model, ids[:PERPLEXITY_WINDOWS], options.repeats))
    for row, limit in zip(result.rows, (calibration.LIMIT, PERPLEXITY_LIMIT), strict=True):
        result.checks.append(Check(f"{row['what']} / bare forward", row["ratio"], limit))
    return result


def measure_perplexity(model: Any, ids: Tensor, repeats: int) -> dict[str, Any]:
    """Time the perplexity beside the forward pass with LM head, and return a row of the result.

    The perplexity uses the batch size of its preset, the forward pass its best batch size.
    """
    batch = int(compose(["evaluation=perplexity"]).evaluation.perplexity.batch_size)
    passes: dict[int, Callable[[], object]] = {
        size: partial(run_forward_with_head, model, ids, size) for size in (1, 2, 4, 8) if size <= len(ids)
    }
    run_forward_with_head(model, ids[:1], 1)
    cuda = model.device.type == "cuda"
    tried = time_in_alternation({str(size): call for size, call in passes.items()}, 2, cuda)
    best = min(passes, key=lambda size: min(tried[str(size)]))

    def ours() -> object:
        return negative_log_likelihood(model, ids, batch, "benchmark")

    seconds = time_in_alternation({"bare": passes[best], "ours": ours}, repeats, cuda)
    ratio, ratios = paired_ratios(seconds["ours"], seconds["bare"])
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
            "bare": measure_peak_besides_weights(
                weights, on_device, partial(run_forward_with_head, model, on_device, best)
            ),
            "ours": measure_peak_besides_weights(
                weights, on_device, lambda: negative_log_likelihood(model, on_device, batch, "benchmark")
            ),
        },
    }


def run_forward_with_head(model: Any, ids: Tensor, batch_size: int) -> None:
    """Run the forward pass with which the perplexity is compared. It computes the logits of all tokens only."""
    import torch

    with torch.no_grad():
        for batch in ids.split(batch_size):
            model(batch.to(model.device), use_cache=False)


def render_table(result: Result) -> str:
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
            f"**{row['ratio']:.3f}** ({format_range(row['ratios'], 3)})",
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
    return markdown_table("Cost on a model file", head, rows, result, explained)


def _positive_number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    sys.exit(main())
