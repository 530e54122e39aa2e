"""Searches: what they measure, what they save, how they resume; and the methods that stand on them."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

import cfsp
from cfsp.architecture.views import resolve
from cfsp.calibration.statistics_cache import StatisticsCache
from cfsp.config.budget import Budget
from cfsp.errors import BudgetError, ConfigError, DataError, RunError, UnsupportedModelError
from cfsp.evaluation.perplexity import negative_log_likelihood
from cfsp.model.driver import BlockDriver
from cfsp.plan.pruning_plan import BlockPlan, PruningPlan
from cfsp.pruner.block_pruner import BlockPruner
from cfsp.pruner.search import KnownLosses, SubmoduleSearch
from cfsp.pruner.two_ssp import TwoSSP
from cfsp.system.cache import saved_seconds
from tests.helpers.contexts import IDS, context_of
from tests.helpers.tiny import ARCHITECTURES, tiny_model, tokens


def without(model, *candidates) -> torch.nn.Module:
    """A copy with these submodules removed for real."""
    gone = set(candidates)
    blocks = tuple(
        BlockPlan(attention=(i, "attention") not in gone, ffn=(i, "ffn") not in gone)
        for i in range(len(model.model.layers))
    )
    return cfsp.apply(copy.deepcopy(model), PruningPlan("m", "f", {}, blocks, {}, {}))


def nll(model) -> float:
    total, count = negative_log_likelihood(model, IDS, 2, "test")
    return total / count


def search_of(model, path=None, batch_size=2) -> SubmoduleSearch:
    return SubmoduleSearch(BlockDriver(resolve(model), batch_size), IDS, KnownLosses(path))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma2", "olmo2"])
def test_a_nulled_submodule_is_a_removed_one(architecture):
    model = tiny_model(architecture)
    with search_of(model) as search:
        for candidate in [(0, "attention"), (2, "ffn"), (2, "attention")]:
            assert search.loss(candidate) == pytest.approx(nll(without(model, *search.removed, candidate)), rel=1e-5)
            search.remove(candidate)
    assert all("forward" not in vars(module) for module in model.modules())


def test_the_prefix_is_not_run_again():
    model = tiny_model(blocks=6)
    everything = [(block, kind) for block in range(6) for kind in ("attention", "ffn")]
    with search_of(model) as search:
        losses = [search.loss(candidate) for candidate in everything]
        # Once through the prefix (5 blocks), and each candidate from its own block on.
        assert search.block_runs == 5 + 2 * (6 + 5 + 4 + 3 + 2 + 1)
        assert losses == pytest.approx([nll(without(model, candidate)) for candidate in everything], rel=1e-5)
        search.remove((3, "ffn"))
        before = search.block_runs
        search.loss((5, "ffn"))
        assert search.block_runs - before == 2 + 1, "only blocks 3 and 4 stand anew between the cache and block 5"


def test_greedy_takes_what_brute_force_takes():
    model = tiny_model()
    everything = [(block, kind) for block in range(4) for kind in ("attention", "ffn")]
    with search_of(model) as search:
        search.greedy(lambda removed: [c for c in everything if c not in removed] if len(removed) < 2 else [])
        found = list(search.removed)
    first = min(everything, key=lambda c: nll(without(model, c)))
    second = min((c for c in everything if c != first), key=lambda c: nll(without(model, first, c)))
    assert found == [first, second]
    assert search.history[1]["nll"] == pytest.approx(nll(without(model, first, second)), rel=1e-5)


def test_a_killed_search_goes_on_where_it_was(tmp_path, monkeypatch):
    model, everything = tiny_model(), [(block, "ffn") for block in range(4)]
    right, calls = SubmoduleSearch._loss_from, itertools.count(1)

    def dies(self, first):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return right(self, first)

    def greedy(search):
        search.greedy(lambda removed: [c for c in everything if c not in removed] if len(removed) < 2 else [])
        return search.history

    whole = greedy(search_of(tiny_model()))
    monkeypatch.setattr(SubmoduleSearch, "_loss_from", dies)
    with pytest.raises(KeyboardInterrupt), search_of(model, tmp_path / "known.json") as search:
        greedy(search)
    assert all("forward" not in vars(module) for module in model.modules())
    assert len(json.loads((tmp_path / "known.json").read_text())) == 3
    measured = []
    monkeypatch.setattr(SubmoduleSearch, "_loss_from", lambda self, first: measured.append(first) or right(self, first))
    with search_of(model, tmp_path / "known.json") as search:
        assert greedy(search) == whole
    assert len(measured) == 7 - 3
    measured.clear()
    with search_of(model, tmp_path / "known.json") as search:
        assert greedy(search) == whole
        assert search.block_runs == 0, "nothing is run where every loss is known"
    assert not measured


def test_kept_losses_belong_to_one_model_ids_and_state(tmp_path, caplog):
    model = tiny_model()
    context = context_of(model, Budget(0.3), StatisticsCache(tmp_path, "sha256:one"))
    other = context_of(model, Budget(0.3), StatisticsCache(tmp_path, "sha256:two"))
    paths = {
        KnownLosses.of(context, IDS, {}).path,
        KnownLosses.of(context, IDS[:1], {}).path,
        KnownLosses.of(context, IDS, {"ffn_kept": [[1]]}).path,
        KnownLosses.of(other, IDS, {}).path,
    }
    assert len(paths) == 4
    path = tmp_path / "known.json"
    path.write_text("{")
    assert KnownLosses(path).values == {}
    assert "cannot be read" in caplog.text


def test_a_loss_that_is_not_finite_is_never_chosen():
    model = tiny_model()
    with search_of(model) as search:
        search.known.put([(1, "ffn")], math.inf, 0.0)
        search.greedy(lambda removed: [] if removed else [(1, "ffn"), (2, "ffn")])
        assert search.removed == [(2, "ffn")]
        search.known.put([(1, "ffn"), (2, "ffn")], math.inf, 0.0)
        with pytest.raises(RunError, match="not finite whatever is removed"):
            search.greedy(lambda removed: [(1, "ffn")])


def test_windows_of_one_token_are_refused():
    with pytest.raises(DataError, match="no next token to predict"):
        cfsp.prune(tiny_model(), tokens(4, 1), "block_pruner", 0.3)


# 2SSP


@pytest.mark.parametrize(
    ("pruner", "budget", "message"),
    [
        (
            TwoSSP("two_ssp", attention_submodules=5),
            Budget(0.2, "decoder", round_to=1),
            "removes 5 of 6 attention submodules, more than the whole target; use pruner.attention_submodules=4",
        ),
        (
            TwoSSP("two_ssp", attention_submodules=6),
            Budget(0.9, "decoder", round_to=1),
            "that is every one; use pruner.attention_submodules=5",
        ),
        (
            TwoSSP("two_ssp", attention_submodules=0),
            Budget(0.8, "decoder", round_to=1),
            "1 neurons in every block are still too many; use pruner.attention_submodules=2",
        ),
        (
            TwoSSP("two_ssp", attention_submodules=3),
            Budget(0.97, "decoder", round_to=32),
            "no other number can meet it; use a smaller sparsity.ratio, min_width or round_to",
        ),
        (TwoSSP("two_ssp"), Budget(0.3, "decoder", protect="auto"), "protects none"),
    ],
    ids=["beyond-the-target", "all-attention", "ffn-cannot", "nothing-can", "protected"],
)
def test_two_ssp_refuses_what_it_cannot_do(pruner, budget, message):
    with pytest.raises((BudgetError, ConfigError), match=message):
        pruner.check(resolve(tiny_model(blocks=6)), budget)


def test_the_number_that_a_refusal_names_works():
    view = resolve(tiny_model(blocks=6))
    with pytest.raises(BudgetError, match=r"use pruner.attention_submodules=(\d+)") as caught:
        TwoSSP("two_ssp", attention_submodules=5).check(view, Budget(0.2, "decoder", round_to=1))
    most = int(str(caught.value).split("use pruner.attention_submodules=")[1].split()[0])
    TwoSSP("two_ssp", attention_submodules=most).check(view, Budget(0.2, "decoder", round_to=1))


def test_two_ssp_needs_equal_blocks():
    model = tiny_model(blocks=6)
    cfsp.apply(model, cfsp.prune(model, tokens(), ratio=0.3, round_to=8))
    with pytest.raises(UnsupportedModelError, match="needs equal blocks"):
        TwoSSP("two_ssp").check(resolve(model), Budget(0.2, "decoder"))


@pytest.mark.parametrize(("scope", "ratio"), [("decoder", 0.3), ("model", 0.26)])
def test_two_ssp_follows_its_formulas(scope, ratio):
    model = tiny_model(blocks=6)
    context = context_of(model, Budget(ratio, scope, round_to=1))
    plan = TwoSSP("two_ssp").plan(context)
    layers = model.model.layers
    attention, ffn, norms = 3072, 9216, 64
    decoder = 6 * (attention + ffn + norms)
    whole = {"decoder": decoder, "model": sum(p.numel() for p in model.parameters())}[scope]
    target = ratio * whole / decoder
    n = round(6 * target ** ((ffn / attention) / 1.5))
    rate = (round(target * decoder) - n * attention) / (6 * ffn)
    assert plan.notes["attention_submodules"] == n == sum(not block.attention for block in plan.blocks)
    assert plan.notes["width"] == round(96 * (1 - rate))
    assert {len(block.ffn_kept) for block in plan.blocks} == {plan.notes["width"]}
    assert len(layers[0].mlp.down_proj.weight[0]) == 96, "the model is left as it was"


def test_every_block_of_two_ssp_keeps_the_same_multiple():
    plan = TwoSSP("two_ssp").plan(context_of(tiny_model(blocks=6), Budget(0.3, "decoder", round_to=32)))
    assert {len(block.ffn_kept) for block in plan.blocks} == {64}


# BlockPruner


@pytest.mark.parametrize("kind", ["both", "attention", "ffn"])
def test_block_pruner_is_greedy_within_its_kind(kind):
    model = tiny_model(blocks=6)
    ratio = 0.1 if kind == "attention" else 0.3
    context = context_of(model, Budget(ratio, "decoder"))
    plan = BlockPruner("block_pruner", submodules=kind, search_sequences=None).plan(context)
    kinds = {step["kind"] for step in plan.notes["removed"]}
    assert kinds <= ({"attention", "ffn"} if kind == "both" else {kind})
    # The first removal is the best of all that the budget allows; brute force over them.
    decoder = sum(p.numel() for p in model.model.layers.parameters())
    sizes = {"attention": 3072 + 32, "ffn": 9216 + 32}
    allowed = [
        (block, k)
        for block in range(6)
        for k in (("attention", "ffn") if kind == "both" else (kind,))
        if abs(ratio * decoder - sizes[k]) < ratio * decoder
    ]
    best = min(allowed, key=lambda c: nll(without(model, c)))
    assert (plan.notes["removed"][0]["block"], plan.notes["removed"][0]["kind"]) == best
    assert abs(plan.achieved["removed_parameters"] - ratio * decoder) <= 9248 / 2


def test_block_pruner_refuses_what_no_submodule_can_do():
    view = resolve(tiny_model())
    with pytest.raises(BudgetError, match=r"cannot be met.*are 0\.1\d+ of it"):
        BlockPruner("block_pruner", submodules="attention").check(view, Budget(0.5, "decoder"))
    with pytest.raises(BudgetError, match="removes less at a time"):
        BlockPruner("block_pruner").check(view, Budget(0.01, "decoder"))


def test_one_attention_stays():
    model = tiny_model(blocks=3)
    plan = BlockPruner("block_pruner").plan(context_of(model, Budget(0.8, "decoder")))
    assert any(block.attention for block in plan.blocks)
    cfsp.apply(model, plan)


def test_ffns_go_where_no_attention_was_recognised():
    view = resolve(tiny_model())
    unknown = replace(view, blocks=tuple(replace(block, attention=None) for block in view.blocks))
    with pytest.raises(UnsupportedModelError, match="use pruner.submodules=ffn"):
        BlockPruner("block_pruner").check(unknown, Budget(0.3, "decoder"))
    BlockPruner("block_pruner", submodules="ffn").check(unknown, Budget(0.3, "decoder"))


def test_two_ssp_splits_as_published():
    """N*, K of facts/2ssp.md, from shapes alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "llama": (4096, 11008, 32, 32, 32, [(5, 7744), (9, 6368), (13, 4992)]),
        "mistral": (4096, 14336, 32, 32, 8, [(1, 10005), (2, 7893), (5, 5994)]),
        "qwen2": (3584, 18944, 28, 28, 4, [(0, 13525), (0, 10816), (1, 8204)]),
    }
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    for architecture, (*values, expected) in sizes.items():
        with torch.device("meta"):
            config = AutoConfig.for_model(architecture, **dict(zip(names, values, strict=True)))
            view = resolve(AutoModelForCausalLM.from_config(config))
        shares = [TwoSSP("two_ssp")._share(view, Budget(r, "decoder", round_to=1)) for r in (0.25, 0.375, 0.5)]
        assert [(share.n_attention, share.width) for share in shares] == expected


def test_a_killed_two_ssp_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model(blocks=6)
    context, before = context_of(model, Budget(0.3, "decoder")), copy.deepcopy(model.state_dict())

    def dies(self, first):
        raise KeyboardInterrupt

    monkeypatch.setattr(SubmoduleSearch, "_loss_from", dies)
    with pytest.raises(KeyboardInterrupt):
        TwoSSP("two_ssp").plan(context)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_search_that_reads_losses_says_what_they_had_cost(tmp_path):
    path = tmp_path / "kept.json"
    KnownLosses(path).put([(1, "ffn")], 2.0, 3.5)
    again, entry = KnownLosses(path), {}
    with saved_seconds(entry):
        assert again.get([(1, "ffn")]) == 2.0
        assert again.get([(1, "ffn")]) == 2.0
        again.put([(2, "ffn")], 1.0, 5.0)
        assert again.get([(2, "ffn")]) == 1.0
        assert again.get([(3, "ffn")]) is None
    assert entry["saved_seconds"] == 3.5, "once, and not what this search measured itself"
