"""Agreement on a real language model with the published methods, written here a second time and in another way.

SmolLM2-135M-Instruct from ../shared/models, 8 sequences of 256 tokens of WikiText-2. The reference uses nothing of
cfsp: transformers' own GGUF reader, forward hooks, all activations held in memory, the formulas as the released codes
have them (the normalisation within a neuron of CFSP's included). Kept neurons must be identical: both sides compute
the same fp32 activations, and only sums are taken in another order. Distances and keep ratios within 1e-6, as on the
small models.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cfsp
from cfsp.allocator.coarse import Coarse
from cfsp.allocator.global_rank import GlobalRank
from cfsp.architecture.views import resolve
from cfsp.calibration.calibrate import calibrate
from cfsp.calibration.calibration_set import CalibrationSet
from cfsp.config.budget import Budget
from cfsp.importance.base import score
from cfsp.importance.cfsp_released import CfspReleased
from cfsp.importance.flap import Flap
from cfsp.importance.wanda import Wanda
from cfsp.model.driver import BlockDriver
from cfsp.sparsity.budget import Sizes, to_widths
from tests.conftest import shared

N, T = 8, 256
DISTANCES = ("angular", "cosine", "mse", "mae")
VARIANTS = ("three_w_one_wa", "wanda_base")


def _file() -> Path:
    return shared("models", "smollm2-135m-instruct.Q4_1.gguf")


@cache
def _tokens() -> torch.Tensor:
    _, tokenizer = _loaded()
    text = shared("data", "wikitext2_raw", "train_excerpt.txt").read_text(encoding="utf-8")
    ids = tokenizer(text[:20_000], add_special_tokens=False)["input_ids"][: N * T]
    return torch.tensor(ids).view(N, T)


@cache
def _loaded():
    return cfsp.load(_file(), dtype="float32")


@cache
def _ours():
    model, _ = _loaded()
    view = resolve(model)
    statistics, _ = calibrate(BlockDriver(view, 4), CalibrationSet(_tokens(), "reference", "given", 0))
    return view, statistics


@cache
def _reference() -> SimpleNamespace:
    """Hidden states and activations of stock transformers: distances [L] by name, and activations [L][N, T, d_ff]."""
    from transformers import AutoModelForCausalLM

    file = _file()
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    activations: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
        for layer, kept in zip(model.model.layers, activations, strict=True)
    ]
    ends: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in model.model.layers]
    handles += [
        layer.register_forward_hook(
            lambda _, args, output, kept=kept: kept.append((args[0], output if torch.is_tensor(output) else output[0]))
        )
        for layer, kept in zip(model.model.layers, ends, strict=True)
    ]
    with torch.no_grad():
        for sequence in _tokens():
            model.model(sequence[None], use_cache=False)
    for handle in handles:
        handle.remove()
    distances: dict[str, list[float]] = {name: [] for name in DISTANCES}
    for pairs in ends:
        x, y = (torch.cat(side).double() for side in zip(*pairs, strict=True))
        cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1).clamp(-1, 1)
        distances["angular"].append(float((cosine.arccos() / torch.pi).mean()))
        distances["cosine"].append(float((1 - cosine).mean()))
        distances["mse"].append(float((x - y).square().mean()))
        distances["mae"].append(float((x - y).abs().mean()))
    return SimpleNamespace(
        model=model,
        distances={name: torch.tensor(values, dtype=torch.float64) for name, values in distances.items()},
        activations=[torch.cat(kept) for kept in activations],
    )


def _reference_scores(block: int, method: str) -> torch.Tensor:
    """Scores [d_ff] of the neurons of a block, float64."""
    reference = _reference()
    mlp = reference.model.model.layers[block].mlp
    activation = reference.activations[block].double().flatten(0, 1)
    gate, up, down = (m.weight.detach().double() for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    norm = activation.square().mean(0).sqrt()
    if method == "three_w_one_wa":
        within = [down.abs() / down.abs().sum(0), (gate.abs() / gate.abs().sum(1, True)).T]
        within.append((up.abs() / up.abs().sum(1, True)).T)
        return sum(share * norm for share in within).mean(0)  # type: ignore[union-attr]
    if method == "wanda_base":
        return (down.abs() * norm).mean(0)
    if method == "flap":
        return activation.var(0, unbiased=False) * down.square().sum(0)
    assert method == "two_ssp"
    return reference.activations[block].double().norm(dim=1).mean(0)


def _reference_keep(distance: torch.Tensor, ratio: float) -> torch.Tensor:
    """Keep ratios as CFSP's released code computes them, for sums scaled to 128 x 1,024 tokens."""
    share = torch.sigmoid((distance - distance.mean()) * 128 * 1024 / 1e4)
    keep = (1 - ratio) * share / share.mean()
    if keep.max() >= 1:
        mean, highest = share.mean(), share.max()
        share = mean + (share - mean) * (mean * (1 / (1 - ratio) - 1) / (highest - mean) / 1.05)
        keep = (1 - ratio) * share / share.mean()
    return keep


@pytest.mark.parametrize("metric", DISTANCES)
def test_block_distances_and_widths_are_the_released_codes(metric):
    view, statistics = _ours()
    expected = _reference().distances[metric]
    assert torch.allclose(statistics.distance(metric), expected, atol=1e-6, rtol=1e-6)
    sizes, scores = Sizes.of(view), score(view, statistics, CfspReleased())
    for ratio in (0.2, 0.5):
        keep = _reference_keep(expected, ratio)
        ours = Coarse(metric).allocate(scores, sizes, 1 - ratio).keep
        assert torch.allclose(ours, keep, atol=1e-5, rtol=0)
        budget = Budget(ratio, round_to=128, rounding="nearest", min_width=1)
        desired = [value * n for value, n in zip(ours.tolist(), sizes.widths, strict=True)]
        released = [int((float(value) * 1536 + 64) / 128) * 128 for value in keep]
        widths = to_widths(desired, budget, sizes).per_block
        # A released width of 0 becomes the index -1, which keeps everything: that bug is not copied.
        assert [w for w, r in zip(widths, released, strict=True) if r] == [r for r in released if r]


@pytest.mark.parametrize("ratio", [0.2, 0.5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_kept_neurons_are_the_released_codes(variant, ratio):
    view, statistics = _ours()
    keep = _reference_keep(_reference().distances["angular"], ratio)
    for block, values in enumerate(score(view, statistics, CfspReleased(variant)).neurons):
        width = int(1536 * float(keep[block])) + 1
        expected = _reference_scores(block, variant).topk(width).indices.sort().values
        assert torch.equal(values.topk(width).indices.sort().values, expected), f"block {block}"


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_wanda_sp_keeps_the_neurons_of_one_threshold_over_standardised_blocks(ratio):
    view, statistics = _ours()
    scores = [_reference_scores(block, "wanda_base") for block in range(30)]
    standard = torch.stack([(values - values.mean()) / values.std() for values in scores])
    threshold = standard.flatten().sort(descending=True).values[int(standard.numel() * (1 - ratio))]
    expected = standard > threshold
    sizes, ours = Sizes.of(view), score(view, statistics, Wanda())
    keep = GlobalRank().allocate(ours, sizes, 1 - ratio).keep
    for block, values in enumerate(ours.neurons):
        width = round(float(keep[block]) * 1536)
        kept = torch.zeros(1536, dtype=torch.bool)
        kept[values.topk(width).indices] = True
        assert int((kept != expected[block]).sum()) <= 1, f"block {block}"  # the neuron at the threshold itself


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_flap_ranks_by_the_variance_of_all_tokens(ratio):
    view, statistics = _ours()
    ours, kept = score(view, statistics, Flap()), round(1536 * (1 - ratio))
    for block, values in enumerate(ours.neurons):
        expected = _reference_scores(block, "flap").topk(kept).indices.sort().values
        assert torch.equal(values.topk(kept).indices.sort().values, expected), f"block {block}"


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_two_ssp_removes_the_neurons_and_the_attentions_of_the_paper(ratio):
    """Eq. 5, stage 1 by hand, and stage 2 as the loss of each candidate with hooks that skip attentions."""
    model, _ = _loaded()
    plan = cfsp.prune(model, _tokens(), "two_ssp", ratio, "decoder", 1)
    attention, ffn = 576 * 576 * 2 + 576 * 192 * 2, 3 * 576 * 1536
    block = attention + ffn + 2 * 576
    n_attention = round(30 * ratio ** (ffn / attention / 1.5))
    rate = (round(ratio * 30 * block) - n_attention * attention) / (30 * ffn)
    width = round(1536 * (1 - rate))
    kept = [_reference_scores(index, "two_ssp").topk(width).indices.sort().values for index in range(30)]
    assert [list(b.ffn_kept) for b in plan.blocks] == [indices.tolist() for indices in kept]
    assert {i for i, b in enumerate(plan.blocks) if not b.attention} == _greedy_attentions(kept, n_attention)


def _greedy_attentions(kept: list[torch.Tensor], number: int) -> set[int]:
    """Blocks whose attention the released second stage removes from the model with ``kept`` neurons."""
    model, first = _reference().model, _tokens()[:1]
    removed: set[int] = set()
    skipped: set[int] = set()

    def skip(index):
        return lambda _, args, output: (output[0] * 0, *output[1:]) if index in skipped else output

    def masked(indices):
        mask = torch.zeros(1536)
        mask[indices] = 1
        return lambda _, args: (args[0] * mask,)

    handles = [layer.self_attn.register_forward_hook(skip(i)) for i, layer in enumerate(model.model.layers)]
    handles += [
        layer.mlp.down_proj.register_forward_pre_hook(masked(indices))
        for layer, indices in zip(model.model.layers, kept, strict=True)
    ]
    try:
        for _ in range(number):
            losses = {}
            for candidate in set(range(30)) - removed:
                skipped.clear()
                skipped.update(removed | {candidate})
                with torch.no_grad():
                    losses[candidate] = float(model(first, labels=first, use_cache=False).loss)
            removed.add(min(losses, key=lambda index: losses[index]))
    finally:
        for handle in handles:
            handle.remove()
    return removed
