"""Agreement with the authors' released code on real small models (../shared/golden).

Tolerances: block distances 1e-6 and keep ratios 1e-6 because both sides accumulate fp32 activations of the same
model in another order (observed 1e-8); the kept neurons must be identical. FLAP's released running variance aliases
the mean that it subtracts, so its scores differ a little from the variance: 97.5 % of its neurons are asked for. Its
bias is compared with its own mask imposed, so only fp32 sums differ (observed 3e-7 of the maximum; 1e-5 asked for).
"""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch

from cfsp.allocator.coarse import Coarse
from cfsp.allocator.global_rank import GlobalRank
from cfsp.architecture.views import resolve
from cfsp.calibration.block_pass import block_by_block
from cfsp.calibration.calibrate import calibrate
from cfsp.calibration.calibration_set import CalibrationSet
from cfsp.config.budget import Budget
from cfsp.importance.base import score
from cfsp.importance.cfsp_released import CfspReleased
from cfsp.importance.flap import Flap
from cfsp.importance.wanda import Wanda
from cfsp.model.driver import BlockDriver
from cfsp.model.load import load
from cfsp.plan.pruning_plan import BlockPlan
from cfsp.pruner.compensation import bias_compensation
from cfsp.sparsity.budget import Sizes, to_widths
from tests.conftest import SHARED, shared

MODELS = {"stories260K": "stories260K", "babyllama361": "babyllama-1M"}


def _cases() -> list:
    return list(_each_case())


def _each_case():
    for name in MODELS:
        path = SHARED / "golden" / f"golden_{name}.json"
        if not path.exists():
            yield pytest.param(name, None, id=f"{name}-absent")
            continue
        for case in json.loads(path.read_text())["cases"]:
            label = "-".join(str(case[key]) for key in ("method", "ratio", "block_metric", "neuron_metric", "round_to"))
            yield pytest.param(name, case, id=f"{name}-{label}")


@cache
def _calibrated(name: str, one_block_at_a_time: bool = False):
    model, _ = load(shared("models", MODELS[name]))
    arrays = np.load(shared("golden", f"golden_{name}.npz"))
    tokens = torch.from_numpy(arrays["tokens"].astype(np.int64))
    view = resolve(model)
    if one_block_at_a_time:
        return view, block_by_block(BlockDriver(view, 8), tokens, None, None), arrays
    statistics, _ = calibrate(BlockDriver(view, 8), CalibrationSet(tokens, "golden", "given", 0))
    return view, statistics, arrays


def _metric(case):
    return Wanda() if case["method"] == "wanda_sp" else CfspReleased(case["neuron_metric"])


@pytest.mark.parametrize(("name", "case"), _cases())
def test_kept_neurons_are_the_released_codes(name, case):
    shared("golden", f"golden_{name}.json")
    view, statistics, arrays = _calibrated(name)
    scores = score(view, statistics, _metric(case))
    mask = arrays[f"mask_{case['case']}"]
    for block, (values, golden) in enumerate(zip(scores.neurons, mask, strict=True)):
        width = int(golden.sum())
        kept = np.zeros_like(golden)
        kept[values.argsort(descending=True, stable=True)[:width].numpy()] = True
        assert (kept == golden).all(), f"block {block}: {(kept != golden).sum()} neurons differ"


@pytest.mark.parametrize(("name", "case"), [c for c in _cases() if c.values[1] and c.values[1]["method"] == "cfsp"])
def test_block_distances_keep_ratios_and_widths_are_the_released_codes(name, case):
    view, statistics, _ = _calibrated(name)
    scores = score(view, statistics, _metric(case))
    ours = statistics.distance(case["block_metric"])
    assert torch.allclose(ours, torch.tensor(case["block_distance_mean"], dtype=torch.float64), atol=1e-6, rtol=0)
    sizes = Sizes.of(view)
    keep = Coarse(case["block_metric"]).allocate(scores, sizes, 1 - case["ratio"]).keep
    assert torch.allclose(keep, torch.tensor(case["keep_ratio"], dtype=torch.float64), atol=1e-6, rtol=0)
    budget = Budget(case["ratio"], round_to=case["round_to"], rounding="nearest", min_width=1)
    desired = [ratio * n for ratio, n in zip(keep.tolist(), sizes.widths, strict=True)]
    widths = to_widths(desired, budget, sizes).per_block
    for block, (width, golden) in enumerate(zip(widths, case["kept"], strict=True)):
        if case["round_to"] > 1 and int((desired[block] + 64) / 128) == 0:
            continue  # the released index becomes -1 there and the block keeps everything: a bug that is not copied
        assert width == golden, f"block {block}"


@pytest.mark.parametrize(("name", "case"), [c for c in _cases() if c.values[1] and c.values[1]["method"] == "wanda_sp"])
def test_wanda_sp_widths_are_the_released_codes(name, case):
    view, statistics, _ = _calibrated(name)
    sizes = Sizes.of(view)
    allocation = GlobalRank().allocate(score(view, statistics, Wanda()), sizes, 1 - case["ratio"])
    desired = [ratio * n for ratio, n in zip(allocation.keep.tolist(), sizes.widths, strict=True)]
    for rounding in ("exact", "nearest"):
        budget = Budget(case["ratio"], round_to=1, rounding=rounding, min_width=1)
        assert list(to_widths(desired, budget, sizes, counted=True).per_block) == case["kept"]


@pytest.mark.parametrize("name", MODELS)
def test_block_by_block_driver_collects_the_same(name):
    _, whole, _ = _calibrated(name)
    _, blocks, _ = _calibrated(name, one_block_at_a_time=True)
    for one, other in zip(whole.blocks, blocks.blocks, strict=True):
        assert one.distances == other.distances
        assert torch.equal(one.ffn.mean_square, other.ffn.mean_square)
        assert torch.equal(one.attention.mean_norm, other.attention.mean_norm)


def _flap_cases():
    for name in MODELS:
        path = SHARED / "golden" / f"golden_flap_{name}.json"
        if not path.exists():
            yield pytest.param(name, None, id=f"{name}-absent")
            continue
        for case in json.loads(path.read_text())["cases"]:
            yield pytest.param(name, case, id=f"{name}-{case['ratio']}")


@pytest.mark.parametrize(("name", "case"), list(_flap_cases()))
def test_flap_keeps_the_released_codes_neurons_but_at_the_margin(name, case):
    golden = np.load(shared("golden", f"golden_flap_{name}.npz"))[f"mask_{case['case']}"]
    view, statistics, _ = _calibrated(name)
    sizes, scores = Sizes.of(view), score(view, statistics, Flap())
    allocation = GlobalRank().allocate(scores, sizes, 1 - case["ratio"])
    agree = 0
    for block, (values, mask) in enumerate(zip(scores.neurons, golden, strict=True)):
        width = round(float(allocation.keep[block]) * len(values))
        kept = np.zeros_like(mask)
        kept[values.argsort(descending=True, stable=True)[:width].numpy()] = True
        agree += int((kept == mask).sum())
    assert agree / golden.size >= 0.975


@pytest.mark.parametrize(("name", "case"), list(_flap_cases()))
def test_flap_bias_is_the_released_codes(name, case):
    arrays = np.load(shared("golden", f"golden_flap_{name}.npz"))
    view, statistics, _ = _calibrated(name)
    biases = arrays[f"bias_{case['case']}"]
    for block, mask, bias in zip(view.blocks, arrays[f"mask_{case['case']}"], biases, strict=True):
        imposed = BlockPlan(tuple(int(i) for i in mask.nonzero()[0]))
        tensors = bias_compensation(block, imposed, statistics.blocks[block.index])
        # Where nothing goes, nothing is added.
        ours = tensors[f"blocks.{block.index}.ffn.bias"].numpy() if not mask.all() else np.zeros_like(bias)
        assert np.abs(ours - bias).max() <= 1e-5 * np.abs(biases).max()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("metric", [Wanda(), Flap()], ids=lambda metric: type(metric).__name__.lower())
def test_heads_and_ffn_in_one_ranking_follow_the_definition(name, metric):
    """No golden was made of AL-AM: the definition of FLAP's repository, with the head weighing its real parameters."""
    view, statistics, _ = _calibrated(name)
    sizes, scores = Sizes.of(view, "heads_ffn"), score(view, statistics, metric, "heads_ffn")
    allocation = GlobalRank().allocate(scores, sizes, 0.6)

    def standard(values):
        return (values - values.mean()) / values.std()

    ffn = torch.stack([standard(values) for values in scores.neurons])
    groups = torch.stack([standard(values.flatten()).reshape(values.shape).mean(1) for values in scores.kv_groups])
    attention = view.blocks[0].attention
    neuron, head_dim = 3 * view.model.config.hidden_size, attention.head_dim
    group = 2 * view.model.config.hidden_size * head_dim * (1 + attention.queries_per_group)
    everything = torch.cat([groups.flatten(), ffn.flatten()])
    order = everything.argsort(descending=True, stable=True)
    weight = torch.where(order < groups.numel(), group / neuron, 1.0).double()
    nearest = int((weight.cumsum(0) - 0.6 * weight.sum()).abs().argmin())
    kept = torch.zeros(everything.numel(), dtype=torch.bool)
    kept[order[: nearest + 1]] = True
    assert (allocation.keep_groups * attention.n_kv_heads).tolist() == pytest.approx(
        kept[: groups.numel()].reshape(groups.shape).sum(1).tolist()
    )
    assert (allocation.keep * ffn.shape[1]).tolist() == pytest.approx(
        kept[groups.numel() :].reshape(ffn.shape).sum(1).tolist()
    )
