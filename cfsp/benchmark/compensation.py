"""Cost of least squares: whole prunings beside a bare forward pass, and the kernels at the width of LLaMA-3-8B."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from cfsp.benchmark.alternation import paired_ratios, time_call, time_in_alternation
from cfsp.benchmark.calibration import run_bare_forward, time_batch_sizes
from cfsp.benchmark.part import Check, Result, Settings, format_range, markdown_table
from cfsp.benchmark.shapes import SEQ_LEN, SHAPES, build_model, describe_shape, draw_token_ids

if TYPE_CHECKING:
    import torch

#: Largest cost of the whole pruning, in bare forward passes.
LIMIT = 1.6
SHAPE, WINDOWS, RATIO, SHARE = "small", 8, 0.5, 0.25
#: Shape for the kernels, and the numbers of tokens and blocks for the estimate of a whole model.
WIDE, TOKENS, BLOCKS = "llama3_8b", 128 * 1024, 32
CASES: dict[str, tuple[str, ...]] = {
    "cfsp": (),
    "cfsp + least squares": ("pruner.compensation=least_squares",),
    "obs + least squares": ("pruner.compensation=least_squares", "importance=obs"),
    "cfsp_plus": (),
}
#: Iterations of Gauss-Newton: two steps of 20 each, and one for the set-up of each step.
NEWTON_ITERATIONS = 2 * (20 + 1)
#: Cases that cost many forward passes and are timed only once.
ONCE = ("obs + least squares", "cfsp_plus")


def measure(settings: Settings) -> Result:
    """Measure a row for each case, then the kernels."""
    import torch

    # Start-up time: loads torch.
    import cfsp
    from cfsp.model.device import resolve_device

    device = resolve_device(settings.device)
    result = Result("compensation", "parts=compensation", notes={"gram_share": SHARE, "windows": WINDOWS})
    model = build_model(SHAPES[SHAPE], torch.float32 if device.type == "cpu" else torch.bfloat16, device)
    ids = draw_token_ids(WINDOWS, SEQ_LEN, SHAPES[SHAPE].vocab)
    tried = time_batch_sizes(model, ids)
    batch = min(tried, key=lambda size: tried[size])
    cuda = device.type == "cuda"
    for name, case in CASES.items():
        pruner, overrides = "cfsp_plus" if name == "cfsp_plus" else "cfsp", [*case, f"calibration.gram_share={SHARE}"]
        prune = partial(cfsp.prune, model, ids, pruner, RATIO, batch_size=batch, overrides=overrides)
        repeats = 1 if name in ONCE else settings.repeats
        if repeats > 1:
            prune()
        calls: dict[str, Callable[[], object]] = {"bare": partial(run_bare_forward, model, ids, batch), "ours": prune}
        seconds = time_in_alternation(calls, repeats, cuda)
        ratio, ratios = paired_ratios(seconds["ours"], seconds["bare"])
        result.rows.append({"what": name, "seconds": seconds, "ratio": ratio, "ratios": ratios})
        if name == "cfsp + least squares":
            result.checks.append(Check(f"{SHAPE} {WINDOWS} x {SEQ_LEN}, {name} / bare forward", ratio, LIMIT))
        print(f"compensation: {name}: {ratio:.2f} bare forward passes", flush=True)
    del model
    result.notes["wide"] = measure_kernels(device)
    return result


def measure_kernels(device: torch.device) -> dict[str, Any]:
    """Measure seconds and bytes of the kernels at the FFN width of ``WIDE`` and estimate those of a whole model."""
    import torch

    # Start-up time: loads torch.
    from cfsp.calibration.gram import HELD_OUT, GramSums
    from cfsp.pruner.least_squares import refit

    shape = SHAPES[WIDE]
    n, d, cuda = shape.ffn, shape.hidden, device.type == "cuda"
    sums, x = GramSums(n, device, 1), torch.randn(1, SEQ_LEN, n, device=device)
    no_module: Any = None  # the module that calls the hook, which does not use it
    add = partial(sums, no_module, (x,))
    add()
    gram_seconds = median(time_call(add, cuda) for _ in range(3))
    gram = sums.report().matrix.to(device)
    del sums, x, add
    gram.diagonal().add_(gram.diagonal().mean())
    weight = torch.randn(d, n, device=device)
    kept = torch.arange(0, n, 2, device=device)
    fit_seconds = time_call(lambda: refit(weight, gram, kept, 1e-3), cuda)
    iteration = time_newton_iteration(n // 2, d, device)
    tokens = TOKENS * SHARE
    matrix = 4 * n * n
    return {
        "shape": WIDE,
        "gram_seconds_per_1000_tokens": 1000 * gram_seconds / SEQ_LEN,
        "refit_seconds_per_block": fit_seconds,
        "estimated_seconds": BLOCKS * (tokens * gram_seconds / SEQ_LEN + fit_seconds),
        "newton_seconds_per_1000_tokens": 1000 * iteration,
        "newton_estimated_seconds": BLOCKS * tokens * (1 - 1 / HELD_OUT) * NEWTON_ITERATIONS * iteration,
        # Inputs and targets of the tokens, fp32.
        "newton_bytes": int(2 * 4 * tokens * d),
        "matrix_bytes": matrix,
        "all_matrices_bytes": BLOCKS * matrix,
        # The matrix in fp64, its kept part twice (damped and factored), and the right-hand side twice.
        "refit_bytes": 2 * matrix + 2 * matrix // 2 + 2 * 8 * (n // 2) * d,
    }


def time_newton_iteration(kept: int, hidden: int, device: torch.device) -> float:
    """Return the seconds per token of a conjugate-gradient iteration.

    Args:
        kept: number of neurons that the gated FFN keeps.
        hidden: hidden size.
        device: where to compute.
    """
    import torch

    # Start-up time: loads torch.
    from cfsp.pruner.gauss_newton import FFNFunction, Matrices

    tokens = 256
    at = Matrices(torch.randn(2, kept, hidden, device=device), torch.randn(hidden, kept, device=device))
    pairs = [(torch.randn(tokens, hidden, device=device), torch.randn(tokens, hidden, device=device))]
    function = FFNFunction(torch.nn.functional.silu)

    def once() -> None:
        function.curvature(pairs, at, at)

    once()
    return median(time_call(once, device.type == "cuda") for _ in range(3)) / tokens


def render_table(result: Result) -> str:
    """Render the table as Markdown."""
    # Start-up time: loads torch.
    from cfsp.calibration.gram import HELD_OUT

    rows = [
        [
            row["what"],
            f"{median(row['seconds']['bare']):.2f}",
            f"{median(row['seconds']['ours']):.2f}",
            f"**{row['ratio']:.2f}** ({format_range(row['ratios'])})",
        ]
        for row in result.rows
    ]
    kernels = result.notes["wide"]
    explained = (
        f"Whole prunings of half of the FFN (calibrate, score, plan, refit) of {describe_shape(SHAPE)}, {WINDOWS} "
        f"windows of {SEQ_LEN} tokens, Gram matrices on {SHARE:.0%} of the tokens, beside model.model(ids, "
        "use_cache=False) at its own best batch size, in alternation; selection by obs, and cfsp_plus, once. "
        f"At the width of {kernels['shape']}: "
        f"{kernels['gram_seconds_per_1000_tokens']:.2f} s for the Gram matrix of 1,000 tokens, "
        f"{kernels['refit_seconds_per_block']:.1f} s for the refit of a block; reckoned for {TOKENS:,} calibration "
        f"tokens and {BLOCKS} blocks: {kernels['estimated_seconds'] / 60:.0f} minutes beside the forward pass, "
        f"{kernels['matrix_bytes'] / 1e9:.2f} GB a matrix "
        f"({kernels['all_matrices_bytes'] / 1e9:.0f} GB on disk for all), "
        f"{kernels['refit_bytes'] / 1e9:.1f} GB while one block is refitted. Gauss-Newton (cfsp_plus) takes "
        f"{kernels['newton_seconds_per_1000_tokens']:.2f} s for 1,000 tokens and one iteration there, half of the "
        f"neurons kept: {kernels['newton_estimated_seconds'] / 3600:.1f} hours with {NEWTON_ITERATIONS} iterations on "
        f"these tokens, of which {1 / HELD_OUT:.0%} are held out, and {kernels['newton_bytes'] / 1e9:.1f} GB for "
        f"inputs and targets."
    )
    return markdown_table(
        "What least squares costs", ["pruning", "bare forward, s", "ours, s", "ratio"], rows, result, explained
    )
