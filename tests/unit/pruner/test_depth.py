"""Whole blocks: similarity of hidden states, and which blocks go."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import cfsp
from cfsp.architecture.views import resolve
from cfsp.calibration.calibration_set import CalibrationSet
from cfsp.calibration.similarity import block_similarity
from cfsp.calibration.statistics_cache import StatisticsCache
from cfsp.config.budget import Budget
from cfsp.errors import BudgetError
from cfsp.model.driver import BlockDriver
from cfsp.plan.pruning_plan import BlockPlan, PruningPlan
from cfsp.pruner.depth import ShortGPT, SlidingWindow
from tests.helpers.contexts import IDS, context_of
from tests.helpers.tiny import tiny_model, tokens


def hidden_states(model):
    """h_0 .. h_L; transformers norms the last one, so that comes from the last block itself."""
    last = []
    handle = model.model.layers[-1].register_forward_hook(lambda _, args, out: last.append(out))
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
    handle.remove()
    return [*states[:-1], last[0]]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_similarity_is_the_cosine_of_the_hidden_states(architecture):
    model = tiny_model(architecture)
    driver = BlockDriver(resolve(model), 3)
    found, _ = block_similarity(driver, CalibrationSet(IDS, "", "", 0))
    states = hidden_states(model)
    for i, one in enumerate(states):
        for j, other in enumerate(states):
            cosine = torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=-1)
            assert float(found.mean[i, j]) == pytest.approx(float(cosine.mean()), abs=1e-5)
            assert float(found.last[i, j]) == pytest.approx(float(cosine[:, -1].mean()), abs=1e-5)


def test_similarity_is_cached_by_content(tmp_path, caplog):
    driver, calibration = BlockDriver(resolve(tiny_model()), 4), CalibrationSet(IDS, "", "", 0)
    cache = StatisticsCache(tmp_path, "sha256:one")
    first, cached = block_similarity(driver, calibration, cache)
    assert not cached
    again, cached = block_similarity(driver, calibration, cache)
    assert cached
    assert torch.equal(first.mean, again.mean)
    assert not block_similarity(driver, CalibrationSet(tokens(2, 16), "", "", 0), cache)[1]
    for file in (tmp_path / "similarity").iterdir():
        file.write_bytes(b"damaged")
    assert not block_similarity(driver, calibration, cache)[1]
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize("which", ["mean", "last"])
def test_shortgpt_removes_the_least_influential_blocks(which):
    model = tiny_model(blocks=6)
    plan = ShortGPT("shortgpt", tokens=which).plan(context_of(model, Budget(0.34, "decoder", protect=(1, 0))))
    states = hidden_states(model)
    influence = []
    for one, other in pairwise(states):
        cosine = torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=-1)
        influence.append(1 - float((cosine if which == "mean" else cosine[:, -1]).mean()))
    expected = sorted(sorted(range(1, 6), key=lambda block: influence[block])[:2])
    assert plan.notes["removed_blocks"] == expected
    assert [block.keeps_block for block in plan.blocks] == [index not in expected for index in range(6)]


@pytest.mark.parametrize("which", ["mean", "last"])
def test_the_window_with_the_most_similar_ends_goes(which):
    model = tiny_model(blocks=6)
    plan = SlidingWindow("sliding_window", tokens=which).plan(context_of(model, Budget(0.5, "decoder")))
    states = hidden_states(model)

    def alike(start):
        cosine = torch.nn.functional.cosine_similarity(states[start], states[start + 3], dim=-1)
        return float((cosine if which == "mean" else cosine[:, -1]).mean())

    start = max(range(4), key=alike)
    assert plan.notes["removed_blocks"] == [start, start + 1, start + 2]


@pytest.mark.parametrize("pruner", ["shortgpt", "sliding_window"])
@pytest.mark.parametrize(("ratio", "gone"), [(0.2, 1), (0.35, 2), (0.5, 3)])
def test_as_many_blocks_go_as_come_nearest_to_the_budget(pruner, ratio, gone):
    model = tiny_model(blocks=6)
    pruned = cfsp.apply(model, cfsp.prune(model, tokens(), pruner, ratio))
    assert len(pruned.model.layers) == pruned.config.num_hidden_layers == 6 - gone
    assert [layer.self_attn.layer_idx for layer in pruned.model.layers] == list(range(6 - gone))
    assert pruned.config.model_type == "llama", "whole blocks less are still a plain LLaMA"


@pytest.mark.parametrize("pruner", [ShortGPT("shortgpt"), SlidingWindow("sliding_window")], ids=lambda p: p.name)
def test_budgets_that_no_number_of_blocks_meets(pruner):
    view = resolve(tiny_model())
    with pytest.raises(BudgetError, match="removes less at a time"):
        pruner.check(view, Budget(0.05, "decoder"))
    with pytest.raises(BudgetError, match=r"the 3 blocks that may go .* are 0\.7500 of it"):
        pruner.check(view, Budget(0.95, "decoder"))
    with pytest.raises(BudgetError, match=r"the 1 blocks that may go \(sparsity.protect=\[2,1\]\)"):
        pruner.check(view, Budget(0.6, "decoder", protect=(2, 1)))


def test_blocks_go_only_where_nothing_protects_them():
    context = context_of(tiny_model(blocks=6), Budget(0.34, "decoder", protect=(2, 2)))
    for pruner in (ShortGPT("shortgpt"), SlidingWindow("sliding_window")):
        plan = pruner.plan(context)
        assert [block != BlockPlan() for block in plan.blocks] == [False, False, True, True, False, False]


def pruned_before(blocks) -> torch.nn.Module:
    return cfsp.apply(tiny_model(blocks=len(blocks)), PruningPlan("m", "f", {}, tuple(blocks), {}, {}))


def test_a_run_that_must_leave_the_only_attention_is_not_taken_for_longer_than_it_is():
    model = pruned_before([BlockPlan(attention=index == 2) for index in range(6)])
    with pytest.raises(BudgetError, match="largest run of blocks that leaves one with attention is 0.4735"):
        SlidingWindow("sliding_window").check(resolve(model), Budget(0.8, "decoder"))


def test_a_window_of_unequal_blocks_is_counted_by_its_own_size():
    model = pruned_before([BlockPlan(ffn_kept=tuple(range(8))) if index < 4 else BlockPlan() for index in range(6)])
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    for ratio in (0.1, 0.2, 0.3, 0.5):
        plan = SlidingWindow("sliding_window").plan(context_of(model, Budget(ratio, "decoder")))
        assert abs(plan.achieved["removed_parameters"] - ratio * sum(sizes)) <= max(sizes) / 2
