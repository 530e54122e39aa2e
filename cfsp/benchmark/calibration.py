"""Cost of calibration, scoring and planning beside a bare forward pass over the same tokens, and their memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from cfsp.benchmark.alternation import paired_ratios, time_call, time_in_alternation
from cfsp.benchmark.part import Check, Result, Settings, format_range, markdown_table
from cfsp.benchmark.shapes import (
    GPU_SEQ_LEN,
    GPU_SHAPE,
    GPU_WINDOWS,
    SEQ_LEN,
    SHAPES,
    build_model,
    describe_shape,
    device_dtypes,
    draw_token_ids,
)
from cfsp.config.compose import compose
from cfsp.config.parse import parse
from cfsp.evaluation.cost import measure_peak_besides_weights
from cfsp.importance.base import score
from cfsp.record.stages import Stages

if TYPE_CHECKING:
    from torch import Tensor

#: Largest cost of calibration, scoring and planning, in bare forward passes.
LIMIT = 1.10
#: Largest peak memory of calibration above that of the bare forward pass, as a share of the weights.
MEMORY_SHARE = 0.05
#: Smallest number of windows over which a batch size is timed.
TRIED_WINDOWS = 8
RATIO = 0.5
#: Largest number of repeats that time each stage alone. Each repeat costs another calibration.
STAGE_REPEATS = 3
STAGES = ("calibrate", "score", "plan", "apply", "save")


def measure(settings: Settings) -> Result:
    """Measure a row for each shape, dtype and number of windows.

    Larger numbers of windows leave out expensive measurements: each stage alone and, on a CPU, the dtypes without a
    limit.
    """
    import torch

    # Start-up time: loads torch.
    from cfsp.model.device import resolve_device

    device = resolve_device(settings.device)
    # The README cites the record with the default number of windows. Other numbers have separate records.
    usual = Settings.windows[0] in settings.windows
    name = "calibration" if usual else f"calibration_{'_'.join(map(str, settings.windows))}_windows"
    arguments = f"windows={','.join(map(str, settings.windows))} shapes={','.join(settings.shapes)}"
    result = Result(name, f"parts=calibration {arguments} dtypes={','.join(settings.dtypes)}")
    cases = [(name, windows, SEQ_LEN) for name in settings.shapes for windows in settings.windows]
    if device.type == "cuda":
        cases.append((GPU_SHAPE, GPU_WINDOWS, GPU_SEQ_LEN))
    fewest: dict[tuple[str, int], int] = {}
    for name, windows, length in cases:
        fewest[name, length] = min(windows, fewest.get((name, length), windows))
    for name in dict.fromkeys(name for name, *_ in cases):
        for dtype in device_dtypes(device, settings.dtypes):
            limited = dtype == "float32" or device.type == "cuda"
            model = build_model(SHAPES[name], getattr(torch, dtype), device)
            tried: dict[int, float] = {}
            for _, windows, length in (case for case in cases if case[0] == name):
                smallest = windows == fewest[name, length]
                if not (limited or smallest):
                    continue
                ids = draw_token_ids(windows, length, SHAPES[name].vocab)
                row: dict[str, Any] = {
                    "shape": name,
                    "dtype": dtype,
                    "device": device.type,
                    "windows": windows,
                    "seq_len": length,
                }
                tried = time_batch_sizes(model, ids, tried)
                batch = min(tried, key=lambda size: tried[size])
                row |= {"batch_size": batch, "tried_batch_sizes": tried}
                row |= compare_with_forward(model, ids, batch, settings, stages_alone=smallest)
                result.rows.append(row)
                result.checks += _checks(row, limited=limited)
                print(
                    f"calibration: {_row_name(row)}: {row['ratio']:.3f} ({format_range(row['ratios'], 3)})", flush=True
                )
            del model
    return result


def run_bare_forward(model: Any, ids: Tensor, batch_size: int) -> None:
    """Run the forward pass with which calibration is compared: the decoder without LM head and without hooks.

    Args:
        model: the model.
        ids: windows of tokens, [windows, length].
        batch_size: windows in a batch.
    """
    import torch

    with torch.no_grad():
        for batch in ids.split(batch_size):
            model.model(batch.to(model.device), use_cache=False)


def time_batch_sizes(model: Any, ids: Tensor, known: Mapping[int, float] | None = None) -> dict[int, float]:
    """Time the bare forward pass at several batch sizes.

    The sizes double until a size is no faster than the best before it, holds all windows, or exceeds the memory.

    Args:
        model: the model.
        ids: windows of tokens, [windows, length].
        known: results for fewer windows. Only larger sizes are timed, and only if the largest known size is the best.

    Returns:
        Batch size -> seconds per window, the better of two measurements.
    """
    import torch

    cuda = model.device.type == "cuda"
    seconds_by_size = dict(known or {})
    size = 2 * max(seconds_by_size, default=0) or 1
    if seconds_by_size and min(seconds_by_size, key=lambda tried: seconds_by_size[tried]) != max(seconds_by_size):
        return seconds_by_size
    while size <= len(ids):
        sample = ids[: max(size, TRIED_WINDOWS)]
        try:
            run_bare_forward(model, sample[:size], size)
            seconds = min(time_call(partial(run_bare_forward, model, sample, size), cuda) for _ in range(2)) / len(
                sample
            )
        except torch.OutOfMemoryError:
            break
        seconds_by_size[size], before = seconds, min(seconds_by_size.values(), default=float("inf"))
        if seconds >= before:
            break
        size *= 2
    return seconds_by_size


def compare_with_forward(
    model: Any, ids: Tensor, batch_size: int, settings: Settings, *, stages_alone: bool = True
) -> dict[str, Any]:
    """Time ``cfsp.prune`` and the bare forward pass in alternation, and measure the peak memory of each stage.

    Args:
        model: the model; it is not changed.
        ids: windows of tokens, [windows, length].
        batch_size: windows in a batch.
        settings: settings of the benchmark.
        stages_alone: time each stage alone too.

    Returns:
        The figures of a row of the result.
    """
    import cfsp

    prune = partial(cfsp.prune, model, ids, ratio=RATIO, batch_size=batch_size)
    cfsp.prune(model, ids[:batch_size], ratio=RATIO, batch_size=batch_size)  # imports and configuration
    cuda = model.device.type == "cuda"
    calls: dict[str, Callable[[], object]] = {"bare": lambda: run_bare_forward(model, ids, batch_size), "ours": prune}
    seconds = time_in_alternation(calls, settings.repeats, cuda)
    ratio, ratios = paired_ratios(seconds["ours"], seconds["bare"])
    tokens = ids.numel()
    folder = settings.work / "calibration-saved"
    alone: dict[str, float] | None = None
    resident_peaks: dict[str, int] | None = None
    if stages_alone:
        passes = [time_stages(model, ids, batch_size, folder) for _ in range(min(STAGE_REPEATS, settings.repeats))]
        resident = "peak_gpu_bytes" if cuda else "peak_bytes"
        alone = {name: median(timed[name]["seconds"] for timed in passes) for name in STAGES}
        resident_peaks = {name: max(timed[name][resident] or 0 for timed in passes) for name in STAGES}
    peaks, lm_head_calls = measure_peak_bytes(model, ids[: 2 * batch_size], batch_size, folder)
    return {
        "seconds": seconds,
        "ratio": ratio,
        "ratios": ratios,
        "stages_ratio": alone and (alone["calibrate"] + alone["plan"]) / median(seconds["bare"]),
        "tokens": tokens,
        "tokens_per_second": {name: tokens / median(values) for name, values in seconds.items()},
        "microseconds_per_token": {name: 1e6 * median(values) / tokens for name, values in seconds.items()},
        "stage_seconds": alone,
        "stage_peak_bytes": resident_peaks,
        "weights_bytes": count_weight_bytes(model),
        "peak_beside_weights": peaks,
        "lm_head_calls": lm_head_calls,
    }


def time_stages(model: Any, ids: Tensor, batch_size: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Return the seconds and the peak memory of each stage, and restore the model. The stage plan includes scoring."""
    recorded = Stages()
    try:
        for name, call in _stage_calls(model, ids, batch_size, folder):
            with recorded(name):
                call()
                if model.device.type == "cuda":
                    import torch

                    torch.cuda.synchronize()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {entry["name"]: entry for entry in recorded.entries}


def measure_peak_bytes(model: Any, ids: Tensor, batch_size: int, folder: Path) -> tuple[dict[str, int], int]:
    """Measure the peak memory beside the weights.

    Returns:
        The bytes of the bare pass and of each stage, and the number of calls of the LM head.
    """
    weights, on_device = [*model.parameters(), *model.buffers()], ids.to(model.device)
    peaks = {
        "bare": measure_peak_besides_weights(weights, on_device, lambda: run_bare_forward(model, on_device, batch_size))
    }
    calls: list[object] = []
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(None))
    try:
        for name, call in _stage_calls(model, ids, batch_size, folder):
            held = [*model.parameters(), *model.buffers()]
            peaks[name] = measure_peak_besides_weights([*weights, *held], on_device, call)
    finally:
        handle.remove()
        shutil.rmtree(folder, ignore_errors=True)
    return peaks, len(calls)


def count_weight_bytes(model: Any) -> int:
    """Return the bytes of parameters and buffers. Tied ones count once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def _stage_calls(model: Any, ids: Tensor, batch_size: int, folder: Path) -> Any:
    """Yield name and function of each stage in order. A function must be called before the next one is requested."""
    # Start-up time: loads numpy, safetensors, torch.
    from cfsp.architecture.views import resolve
    from cfsp.calibration.calibration_set import from_ids
    from cfsp.checkpoint.save import save_checkpoint
    from cfsp.data.limits import Limits
    from cfsp.model.driver import BlockDriver
    from cfsp.model.snapshot import restored
    from cfsp.pruner.apply import apply
    from cfsp.pruner.context import plan_context

    config = parse(compose(["pruner=cfsp", f"sparsity.ratio={RATIO}"]))
    view = resolve(model)
    driver = BlockDriver(view, batch_size)
    calibration = from_ids(ids, Limits(model.config.vocab_size, model.config.max_position_embeddings))
    kept: dict[str, Any] = {}

    def calibrate() -> None:
        kept["context"], _ = plan_context(
            config, driver, calibration, base_model="benchmark", base_fingerprint="benchmark"
        )

    def plan() -> None:
        kept["plan"] = config.pruner.instance.plan(kept["context"])

    yield "calibrate", calibrate
    yield "score", lambda: score(view, kept["context"].statistics, config.importance.instance)
    yield "plan", plan
    with restored(model):
        yield "apply", lambda: apply(model, kept["plan"])
        yield "save", lambda: save_checkpoint(model, folder, reference=False)  # the reference is another forward pass


def _checks(row: dict[str, Any], *, limited: bool) -> list[Check]:
    peaks = row["peak_beside_weights"]
    allowed = peaks["bare"] + MEMORY_SHARE * row["weights_bytes"]
    checks = [Check(f"{_row_name(row)}, calls of the LM head", row["lm_head_calls"], 0)]
    if limited:
        checks.append(Check(f"{_row_name(row)}, calibration + scoring + planning / bare forward", row["ratio"], LIMIT))
    checks.append(
        Check(f"{_row_name(row)}, MiB of calibration beside the weights", peaks["calibrate"] / 2**20, allowed / 2**20)
    )
    return checks


def _row_name(row: dict[str, Any]) -> str:
    return f"{row['shape']} {row['dtype']} {row['device']} {row['windows']} x {row['seq_len']}"


def render_table(result: Result) -> str:
    """Render the table as Markdown."""
    head = [
        "model, dtype, device, tokens", "batch", "bare forward, s", "ours, s", "ratio (lowest to highest)",
        "stages alone", "tokens/s", "µs/token", *(f"{name}, s" for name in STAGES),
        *(f"{name}, MiB" for name in ("bare", *STAGES)),
    ]  # fmt: skip
    rows = [
        [
            _row_name(row),
            str(row["batch_size"]),
            f"{median(row['seconds']['bare']):.2f}",
            f"{median(row['seconds']['ours']):.2f}",
            f"**{row['ratio']:.2f}** ({format_range(row['ratios'])})",
            "" if row["stages_ratio"] is None else f"{row['stages_ratio']:.2f}",
            f"{row['tokens_per_second']['ours']:,.0f}",
            f"{row['microseconds_per_token']['ours']:,.1f}",
            *("" if row["stage_seconds"] is None else f"{row['stage_seconds'][name]:.2f}" for name in STAGES),
            *(f"{row['peak_beside_weights'][name] / 2**20:,.0f}" for name in ("bare", *STAGES)),
        ]
        for row in result.rows
    ]
    shapes = "; ".join(describe_shape(name) for name in dict.fromkeys(row["shape"] for row in result.rows))
    explained = (
        "bare forward: model.model(ids, use_cache=False) with SDPA at its own best batch size for these windows: "
        "sizes double from 1 until one is no faster than the best before it or holds all windows (each is in the "
        f"record). ours: cfsp.prune at {RATIO:.0%} and the same batch size, which calibrates, scores and plans; both "
        "over the same tokens, in alternation, medians; ratio: median of the pairs' ratios; stages alone: calibrate "
        "and plan (which scores) without checks and fingerprint. The stages are medians too, and are timed for the "
        "smallest number of windows only; so is, on a CPU, every dtype but float32. MiB: most bytes alive beside the "
        "weights over two batches, counted where tensors are made (on a GPU by its allocator); buffers of the file "
        f"writing are outside of it. Resident peaks are in the record. {shapes}."
    )
    return markdown_table("Calibration beside a bare forward pass", head, rows, result, explained)
