"""Growth of the cost of calibration with windows, blocks and widths, each of which is doubled three times."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from cfsp.benchmark.alternation import time_in_alternation
from cfsp.benchmark.part import Check, Result, Settings, format_range, markdown_table
from cfsp.benchmark.shapes import SEQ_LEN, SHAPES, build_model, describe_shape, device_dtypes, draw_token_ids

#: Largest distance of the exponent of windows and of blocks from 1.
TOLERANCE = 0.05
SHAPE = "small"
BATCH_SIZE = 4
#: Values of the sizes that grow. A size that does not grow keeps its first value.
WINDOWS, BLOCKS = (8, 16, 32, 64), (2, 4, 8, 16)
FFN = (1408, 2816, 5632, 11264)
HIDDEN = (256, 512, 1024, 2048)
#: Number of blocks while the windows or a width grow.
FIXED_BLOCKS = 2


def measure(settings: Settings) -> Result:
    """Measure a row for each size that grows."""
    import torch

    # Start-up time: loads torch.
    from cfsp.model.device import resolve_device

    device = resolve_device(settings.device)
    dtype = device_dtypes(device, settings.dtypes)[0]
    build = partial(build_model, SHAPES[SHAPE], getattr(torch, dtype), device)
    per_hidden = SHAPES[SHAPE].ffn / SHAPES[SHAPE].hidden
    result = Result(
        "growth",
        "parts=growth",
        notes={"seq_len": SEQ_LEN, "batch_size": BATCH_SIZE, "dtype": dtype, "device": device.type},
    )
    cases: dict[str, Callable[[], list[tuple[int, Any, int]]]] = {
        "windows": lambda: [(n, model, n) for model in [build(blocks=FIXED_BLOCKS)] for n in WINDOWS],
        "blocks": lambda: [(n, build(blocks=n), WINDOWS[0]) for n in BLOCKS],
        "FFN width": lambda: [(n, build(blocks=FIXED_BLOCKS, ffn=n), WINDOWS[0]) for n in FFN],
        "hidden and FFN width": lambda: [
            (n, build(blocks=FIXED_BLOCKS, hidden=n, ffn=round(per_hidden * n)), WINDOWS[0]) for n in HIDDEN
        ],
    }  # fmt: skip
    for grows, make in cases.items():
        row = measure_growth(grows, make(), settings.repeats)
        result.rows.append(row)
        if grows in ("windows", "blocks"):
            result.checks.append(
                Check(f"{grows}, distance of the exponent from 1", abs(row["exponent"] - 1), TOLERANCE)
            )
        print(f"growth: {grows}: exponent {row['exponent']:.3f}", flush=True)
    return result


def measure_growth(grows: str, cases: list[tuple[int, Any, int]], repeats: int) -> dict[str, Any]:
    """Time the calibration stage while one size grows, and return a row of the result.

    Args:
        grows: name of the size.
        cases: value of the size, model, and number of windows of each case.
        repeats: number of timings of each case.
    """
    # Start-up time: loads numpy, safetensors, torch.
    from cfsp.architecture.views import resolve
    from cfsp.calibration.calibrate import calibrate
    from cfsp.calibration.calibration_set import from_ids
    from cfsp.data.limits import Limits
    from cfsp.model.driver import BlockDriver

    calls: dict[str, Callable[[], object]] = {}
    blocks_parameters = []
    for value, model, windows in cases:
        view = resolve(model)
        limits = Limits(model.config.vocab_size, model.config.max_position_embeddings)
        calibration = from_ids(draw_token_ids(windows, SEQ_LEN, model.config.vocab_size), limits)
        calls[str(value)] = partial(calibrate, BlockDriver(view, BATCH_SIZE), calibration)
        blocks_parameters.append(sum(p.numel() for block in view.blocks for p in block.module.parameters()))
    for call in calls.values():
        call()
    seconds = time_in_alternation(calls, repeats, cases[0][1].device.type == "cuda")
    middle = [median(values) for values in seconds.values()]
    values = [value for value, *_ in cases]
    return {
        "grows": grows,
        "values": values,
        "parameters_of_blocks": blocks_parameters,
        "seconds": seconds,
        "median_seconds": middle,
        "exponent": fit_exponent(values, middle),
        "exponent_of_parameters": fit_exponent(blocks_parameters, middle) if grows != "windows" else None,
    }


def fit_exponent(sizes: list[int], seconds: list[float]) -> float:
    """Fit seconds = a * sizes^b by least squares on the logarithms and return b."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in seconds]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    across = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return across / sum((a - middle_x) ** 2 for a in x)


def render_table(result: Result) -> str:
    """Render the table as Markdown."""
    head = [
        "what grows",
        "values",
        "seconds (medians)",
        "lowest to highest of the last, s",
        "exponent",
        "of parameters",
    ]
    rows = []
    for row in result.rows:
        of_parameters = row["exponent_of_parameters"]
        rows.append(
            [
                row["grows"],
                ", ".join(f"{value:,}" for value in row["values"]),
                ", ".join(f"{value:.3g}" for value in row["median_seconds"]),
                format_range(row["seconds"][str(row["values"][-1])]),
                f"**{row['exponent']:.3f}**",
                "" if of_parameters is None else f"{of_parameters:.3f}",
            ]
        )
    explained = (
        f"Seconds of the calibration stage, {result.notes['dtype']} on {result.notes['device']}, windows of {SEQ_LEN} "
        f"tokens in batches of {BATCH_SIZE}; {WINDOWS[0]} windows and {FIXED_BLOCKS} blocks where these do not grow, "
        f"the rest as in {describe_shape(SHAPE)}. exponent: b of seconds = a x value^b, fitted to the medians; of "
        "parameters: the same with the parameters of the blocks."
    )
    return markdown_table("Growth of the cost of calibration", head, rows, result, explained)
