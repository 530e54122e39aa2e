"""Prefill and decode speed of pruned models, compared with the dense model and with the prediction from their sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from cfsp.benchmark.alternation import paired_ratios
from cfsp.benchmark.part import Check, Result, Settings, format_range, markdown_table
from cfsp.benchmark.shapes import SHAPES, build_model, describe_shape, device_dtypes, draw_token_ids
from cfsp.evaluation.cost import time_sides

#: Smallest ratio of measured to predicted speed-up.
LIMIT = 0.90
#: Pruning ratio and multiple of the widths for which the limit must hold.
LIMIT_RATIO, LIMIT_MULTIPLE = 0.5, 32
PROMPT_TOKENS, NEW_TOKENS = 256, 16
#: Number and length of the calibration windows. Any will do, because the speed does not depend on the kept neurons.
PLAN_WINDOWS, PLAN_SEQ_LEN = 2, 128


@dataclass(frozen=True)
class Variant:
    """A pruned model.

    Attributes:
        pruner: uniform (the same width in all blocks) or cfsp (a width for each block).
        ratio: removed share of the FFN.
        round_to: number of which all widths are multiples.
    """

    pruner: str
    ratio: float
    round_to: int

    def __str__(self) -> str:
        return f"{self.pruner} {self.ratio:.0%} in {self.round_to}s"


#: Groups of variants. Each group is measured in alternation with the dense model. The uniform variant has no case with
#: multiples of 128, because half of the FFN is one already.
GROUPS = (
    (Variant("uniform", 0.5, 32), Variant("cfsp", 0.5, 32)),
    (Variant("cfsp", 0.5, 1), Variant("cfsp", 0.5, 128)),
    (Variant("uniform", 0.3, 32), Variant("cfsp", 0.3, 32)),
    (Variant("uniform", 0.2, 32), Variant("cfsp", 0.2, 32)),
)


def measure(settings: Settings) -> Result:
    """Measure a row for each shape, dtype and pruned model."""
    import torch

    # Start-up time: loads torch.
    from cfsp.model.device import resolve_device

    device = resolve_device(settings.device)
    result = Result("speed", "parts=speed", notes={"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS})
    for name in settings.shapes:
        for dtype in device_dtypes(device, settings.dtypes):
            model = build_model(SHAPES[name], getattr(torch, dtype), device)
            for group in GROUPS:
                for row in compare_variants(model, group, settings.repeats):
                    row = {"shape": name, "dtype": dtype, "device": device.type, **row}
                    result.rows.append(row)
                    result.checks += _checks(row)
                    shown = ", ".join(f"{task} x{row[task]['speedup']:.2f}" for task in ("prefill", "decode"))
                    print(f"speed: {_row_name(row)}: {shown}", flush=True)
            del model
    return result


def compare_variants(model: Any, group: tuple[Variant, ...], repeats: int) -> list[dict[str, Any]]:
    """Return a row for each variant: speeds of dense and pruned, the measured speed-up, and the predicted one."""
    # Start-up time: loads torch.
    import cfsp
    from cfsp.evaluation.base import Side
    from cfsp.model.snapshot import Snapshot

    dense = Snapshot(model)
    snapshots = {"dense": dense}
    widths: dict[str, list[int]] = {}
    ids = draw_token_ids(PLAN_WINDOWS, PLAN_SEQ_LEN, model.config.vocab_size)
    for variant in group:
        plan = cfsp.prune(model, ids, variant.pruner, variant.ratio, round_to=variant.round_to)
        widths[str(variant)] = [int(detail["width"]) for detail in plan.details]
        cfsp.apply(model, plan)
        snapshots[str(variant)] = Snapshot(model)
        dense.restore()
    sides = [Side(name, snapshot.active, model.dtype) for name, snapshot in snapshots.items()]
    costs = {}
    for side in sides:
        with side.active():
            costs[side.name] = predict_costs(model, PROMPT_TOKENS, NEW_TOKENS)
    prompt = draw_token_ids(1, PROMPT_TOKENS, model.config.vocab_size).to(model.device)
    times = time_sides(model, sides, prompt, NEW_TOKENS, repeats)
    rows = []
    for variant in group:
        row: dict[str, Any] = {**asdict(variant), "widths": widths[str(variant)], "cache": times["dense"][0].cache}
        for task, unit, tokens in (("prefill", "macs", PROMPT_TOKENS), ("decode", "bytes_per_step", NEW_TOKENS)):
            before, after = ([getattr(timing, task) for timing in times[side]] for side in ("dense", str(variant)))
            speedup, speedups = paired_ratios(before, after)
            expected = costs["dense"][unit] / costs[str(variant)][unit]
            row[task] = {
                "tokens_per_second": {"dense": tokens / median(before), "pruned": tokens / median(after)},
                "seconds": {"dense": before, "pruned": after},
                unit: {"dense": costs["dense"][unit], "pruned": costs[str(variant)][unit]},
                "speedup": speedup,
                "speedups": speedups,
                "predicted": expected,
                "of_predicted": speedup / expected,
            }
        rows.append(row)
    return rows


def predict_costs(model: Any, prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    """Count the operations of a prefill and the bytes of a decoding step, to which their times should be proportional.

    Args:
        model: the dense or pruned model.
        prompt_tokens: number T of tokens of the prefill.
        new_tokens: number of decoding steps.

    Returns:
        ``macs`` of a prefill of T tokens: every linear layer of the decoder for T tokens, the LM head for one token,
        and the products of queries with keys and of attention weights with values, T (T + 1) / 2 of each in a causal
        pass. ``bytes_per_step`` that a decoding step at batch 1 reads: all weights, with only one row of the embedding,
        and the keys and values of all ``prompt_tokens`` + ``new_tokens`` places of the cache.
    """
    from torch import nn

    # Start-up time: loads torch.
    from cfsp.architecture.views import resolve

    view = resolve(model)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    linears = sum(m.weight.numel() for m in view.decoder.modules() if isinstance(m, nn.Linear))
    macs = prompt_tokens * linears + head.numel()
    numbers = sum(parameter.numel() for parameter in view.decoder.parameters()) - embedding.numel()
    numbers += head.numel() + embedding.shape[1]
    for block in view.blocks:
        if block.attention is not None:
            macs += block.attention.width * prompt_tokens * (prompt_tokens + 1)
            numbers += 2 * block.attention.n_kv_heads * block.attention.head_dim * (prompt_tokens + new_tokens)
    return {"macs": macs, "bytes_per_step": numbers * model.dtype.itemsize}


def _checks(row: dict[str, Any]) -> list[Check]:
    limited = (row["device"], row["dtype"], row["ratio"]) == ("cpu", "float32", LIMIT_RATIO)
    if not limited or row["round_to"] % LIMIT_MULTIPLE:
        return []
    return [
        Check(
            f"{_row_name(row)}, {task}: measured / predicted speed-up", row[task]["of_predicted"], LIMIT, at_least=True
        )
        for task in ("prefill", "decode")
    ]


def _row_name(row: dict[str, Any]) -> str:
    return f"{row['shape']} {row['dtype']} {row['device']} {row['pruner']} {row['ratio']:.0%} in {row['round_to']}s"


def render_table(result: Result) -> str:
    """Render the table as Markdown."""
    head = ["model, dtype, device, pruning"]
    for task in ("prefill", "decode"):
        head += [f"{task}: dense, tokens/s", "pruned, tokens/s", "speed-up (lowest to highest)", "predicted", "of it"]
    rows = []
    for row in result.rows:
        cells = [_row_name(row)]
        for task, digits in (("prefill", 0), ("decode", 1)):
            timed = row[task]
            cells += [
                *(f"{timed['tokens_per_second'][side]:,.{digits}f}" for side in ("dense", "pruned")),
                f"x{timed['speedup']:.2f} ({format_range(timed['speedups'])})",
                f"x{timed['predicted']:.2f}",
                f"**{timed['of_predicted']:.2f}**",
            ]
        rows.append(cells)
    shapes = "; ".join(describe_shape(name) for name in dict.fromkeys(row["shape"] for row in result.rows))
    explained = (
        f"Batch 1: a prefill of {PROMPT_TOKENS} tokens, then {NEW_TOKENS} decoding steps on a KV cache of fixed "
        "length, as evaluation.cost times them: dense and pruned in alternation, medians after a round of warming "
        "up; speed-up: median of the rounds' ratios. FFN neurons removed, widths in multiples of the last number: "
        "one width (uniform) or a width for each block (cfsp). predicted: of a prefill by the MACs of the linear "
        f"layers and of attention, of decoding by the bytes that a step reads (weights, KV cache). {shapes}."
    )
    return markdown_table("Speed of pruned models against prediction", head, rows, result, explained)
