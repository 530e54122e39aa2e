"""Mixtures of experts: neurons of every expert, whole experts, what the calibration pass sees of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import cfsp
from cfsp.architecture.views import resolve
from cfsp.calibration.block_pass import block_by_block
from cfsp.calibration.calibrate import calibrate
from cfsp.calibration.calibration_set import from_ids
from cfsp.calibration.statistics import BlockStatistics, ExpertStatistics, InputStatistics, Statistics
from cfsp.checkpoint.save import save_checkpoint
from cfsp.config.budget import Budget
from cfsp.data.limits import Limits
from cfsp.errors import BudgetError, CfspError, CheckpointError, ConfigError, UnsupportedModelError
from cfsp.importance.base import score
from cfsp.importance.cfsp import Cfsp
from cfsp.importance.magnitude import Magnitude
from cfsp.importance.random import RandomImportance
from cfsp.model.driver import BlockDriver
from cfsp.plan.pruning_plan import BlockPlan, PruningPlan
from cfsp.pruner.expert_choice import best_experts, keep_unseen_experts, score_whole_experts
from cfsp.pruner.probe import probe
from tests.helpers.architectures import BLOCKS, EXPERT_WIDTH, VOCABULARY, Architecture
from tests.helpers.experts import IDS, SHORT, SPARSE, entering, expert_by_hand, logits, routed
from tests.helpers.matrix import in_turn
from tests.helpers.tiny import tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

sparse = pytest.mark.parametrize("architecture", SPARSE.values(), ids=SPARSE)
ROUND = 8
METHODS = {
    "cfsp": ("cfsp", []),
    "flap": ("flap", []),
    "llm_pruner": ("llm_pruner", ["sparsity.protect=none"]),
    "two_ssp": ("two_ssp", []),
    "experts": ("cfsp", ["pruner.structure=experts"]),
}


def calibrated(model, ids: Tensor = IDS) -> Statistics:
    return calibrate(BlockDriver(resolve(model), 2), from_ids(ids, Limits(VOCABULARY, None)))[0]


def hand_plan(*blocks: BlockPlan) -> PruningPlan:
    return PruningPlan("m", "f", {"name": "hand"}, blocks, {}, {})


# Masked == sliced


@contextmanager
def rows_at_minus_infinity(router: nn.Module, gone: list[int]) -> Iterator[None]:
    """The router's logits of the experts ``gone`` are -inf, also where a bias is added to its scores."""
    bias = getattr(router, "e_score_correction_bias", None)
    before = None if bias is None else bias.clone()
    forward, linear = router.forward, F.linear

    def masked(*args, **kwargs):
        out = linear(*args, **kwargs)
        out[..., gone] = -torch.inf
        return out

    def run(*args):
        F.linear = torch.nn.functional.linear = masked
        try:
            return forward(*args)
        finally:
            F.linear = torch.nn.functional.linear = linear

    router.forward = run
    if bias is not None:
        bias[gone] = -torch.inf
    try:
        yield
    finally:
        del router.forward
        if bias is not None:
            bias.copy_(before)


def without(kept, n: int) -> list[int]:
    return sorted(set(range(n)) - set(range(n) if kept is None else kept))


@torch.no_grad()
def masked_logits(a: Architecture, plan: PruningPlan, ids: Tensor) -> Tensor:
    """Of a new dense model in which nothing is sliced, by the description of the architecture."""
    from contextlib import ExitStack

    model = a.build()
    with ExitStack() as stack:
        for index, (block, decision) in enumerate(zip(a.blocks_of(model), plan.blocks, strict=True)):
            attention = block.get_submodule(a.attention_path)
            queries = a.n_heads // a.n_kv_heads
            for group in without(decision.kv_groups_kept, a.n_kv_heads):
                for head in range(group * queries, (group + 1) * queries):
                    getattr(attention, a.attention_names[-1]).weight[:, a.output_columns(head)] = 0
            if not decision.attention:
                attention.register_forward_hook(lambda m, args, out: (torch.zeros_like(out[0]), *out[1:]))
            for kind, output in (("ffn", "mlp.down_proj"), ("attention", f"self_attn.{a.attention_names[-1]}")):
                if (bias := plan.tensors.get(f"blocks.{index}.{kind}.bias")) is not None:
                    block.get_submodule(output).bias = nn.Parameter(bias)
            mixture = block.get_submodule(a.ffn_path)
            if not a.is_sparse(index):
                mixture.down_proj.weight[:, without(decision.ffn_kept, a.width)] = 0
                continue
            said = a.experts
            staying = range(said.n) if decision.experts_kept is None else decision.experts_kept
            for place, expert in enumerate(staying):
                kept = None if decision.expert_neurons_kept is None else decision.expert_neurons_kept[place]
                gone = without(kept, said.width)
                if said.layout == "modules":
                    mixture.experts[expert].down_proj.weight[:, gone] = 0
                elif said.transposed:
                    mixture.experts.down_proj[expert, gone] = 0
                else:
                    mixture.experts.down_proj[expert][:, gone] = 0
            if gone := without(decision.experts_kept, said.n):
                stack.enter_context(rows_at_minus_infinity(getattr(mixture, said.router), gone))
        return logits(model, ids)


def unit_share(view, plan: PruningPlan, method: str) -> float:
    """The largest removable unit as a share of the scope."""
    scope = {
        "ffn": sum(b.ffn.width * b.ffn.neuron_parameters for b in view.blocks),
        "decoder": view.decoder_parameters,
    }[plan.requested["scope"]]
    steps = [ROUND * block.ffn.neuron_parameters for block in view.blocks]
    if method == "experts":
        steps = [b.experts.groups * b.experts.expert_parameters for b in view.mixtures]
    return (sum(steps) if method == "two_ssp" else max(steps)) / scope


def settings(a: Architecture, method: str) -> tuple[str, float, list[str]]:
    pruner, overrides = METHODS[method]
    if method == "llm_pruner" and a.no_heads:
        overrides = [*overrides, "pruner.structure=ffn"]
    # One block of four is a mixture there: its experts are 48 % of the neurons.
    ratio = 0.25 if method == "experts" and a.name == "qwen2_moe" else 0.4
    return pruner, ratio, overrides


@pytest.mark.parametrize(
    ("name", "method"), in_turn(SPARSE, list(METHODS), always=lambda name, method: method == "experts")
)
def test_masked_is_sliced_in_every_form(name, method, tmp_path):
    from transformers import AutoModelForCausalLM

    a = SPARSE[name]
    model = a.build()
    view = resolve(model)
    before = logits(model, SHORT)
    pruner, ratio, overrides = settings(a, method)
    plan = cfsp.prune(model, IDS, pruner=pruner, ratio=ratio, round_to=ROUND, overrides=overrides)
    assert torch.equal(logits(model, SHORT), before), "planning leaves the model as it was"
    assert abs(plan.achieved["ratio"] - ratio) <= unit_share(view, plan, method)
    removes_experts = any(block.experts_kept is not None for block in plan.blocks)
    assert removes_experts == (method == "experts")
    if method in ("cfsp", "flap", "two_ssp"):
        assert any(block.expert_neurons_kept is not None for block in plan.blocks)

    masked = masked_logits(a, plan, SHORT)
    assert (masked - before).abs().max() > 1e-2 * before.abs().max(), "what is removed matters"
    cfsp.apply(model, plan)
    found = logits(model, SHORT)
    assert (found - masked).abs().max() <= 1e-4 * masked.abs().max()
    assert sum(p.numel() for p in model.parameters()) == plan.parameters["after"]

    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json").blocks == plan.blocks
    save_checkpoint(model, tmp_path / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    for one in (model, reloaded):  # matrix products of small sizes round by where in memory their operands lie
        for parameter in one.parameters():
            parameter.data = parameter.data.clone()
    assert torch.equal(logits(reloaded, SHORT), logits(model, SHORT))

    with torch.no_grad():
        made = reloaded.generate(
            SHORT, attention_mask=torch.ones_like(SHORT), do_sample=False, max_new_tokens=6, eos_token_id=None,
            pad_token_id=0, use_cache=True, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    full = logits(reloaded, made.sequences)[:, SHORT.shape[1] - 1 : -1]
    assert (torch.stack(made.logits, 1) - full).abs().max() <= 1e-5 * full.abs().max()


@sparse
def test_every_implementation_of_experts_runs_what_is_left(architecture):
    model = architecture.build()
    cfsp.apply(model, cfsp.prune(model, IDS, ratio=0.4, round_to=ROUND))
    found = logits(model, SHORT)
    for name in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(name)
        assert (logits(model, SHORT) - found).abs().max() <= 1e-5 * found.abs().max(), name


# What the calibration pass sees


@sparse
@torch.no_grad()
def test_statistics_are_those_of_a_hand_computation(architecture):
    a = architecture
    model = a.build()
    found = calibrated(model)
    n, length = IDS.shape
    for index, block in enumerate(a.blocks_of(model)):
        if not a.is_sparse(index):
            assert found.blocks[index].experts is None
            assert found.blocks[index].ffn.mean.shape == (a.width,)
            continue
        mixture = block.get_submodule(a.ffn_path)
        states = entering(mixture, model, IDS)
        chosen, weights = routed(a, mixture, states)
        statistics, experts = found.blocks[index].ffn, found.blocks[index].experts
        assert statistics.mean.shape == (a.experts.n, EXPERT_WIDTH)
        assert experts.tokens.sum() == n * length * a.experts.top_k
        for expert in range(a.experts.n):
            weight = (weights * (chosen == expert)).sum(1)
            inner, out = expert_by_hand(a, mixture, expert, states)
            inner = (inner * (chosen == expert).any(1)[:, None]).view(n, length, -1).double()
            close = {"rtol": 1e-4, "atol": 1e-6}
            assert torch.allclose(statistics.mean[expert], inner.mean((0, 1)), **close)
            assert torch.allclose(statistics.mean_square[expert], inner.square().mean((0, 1)), **close)
            assert torch.allclose(statistics.mean_norm[expert], inner.norm(dim=1).mean(0) / length**0.5, **close)
            assert experts.tokens[expert] == (chosen == expert).sum()
            contribution = (out * weight[:, None]).norm(dim=1).double().mean()
            assert torch.allclose(experts.contribution[expert], contribution, **close)


def test_statistics_do_not_go_with_the_batches_and_survive_the_disk(tmp_path):
    model = SPARSE["qwen3_moe"].build()
    at_once = calibrated(model)
    calibration = from_ids(IDS, Limits(VOCABULARY, None))
    one_by_one = block_by_block(BlockDriver(resolve(model), 1), calibration.input_ids, None, None)
    at_once.save(tmp_path / "s.safetensors", {})
    kept = Statistics.load(tmp_path / "s.safetensors")
    for one, other, read in zip(at_once.blocks, one_by_one.blocks, kept.blocks, strict=True):
        assert torch.allclose(one.ffn.mean_square, other.ffn.mean_square, rtol=1e-5)
        assert torch.equal(one.ffn.mean_norm, read.ffn.mean_norm)
        assert (one.experts is None) == (read.experts is None)
        if one.experts is not None:
            assert torch.equal(one.experts.tokens, other.experts.tokens)
            assert torch.equal(one.experts.tokens, read.experts.tokens)
            assert torch.equal(one.experts.contribution, read.experts.contribution)


def test_the_file_of_a_dense_model_has_the_name_and_the_entries_that_it_had(tmp_path):
    from cfsp.calibration.collectors import COLLECTOR_VERSION
    from cfsp.calibration.statistics_cache import StatisticsCache

    model = tiny_model(blocks=2)
    driver, calibration = BlockDriver(resolve(model), 2), from_ids(tokens(), Limits(128, None))
    cache = StatisticsCache(tmp_path, "f")
    calibrate(driver, calibration, cache)
    path = cache.path("statistics", driver, calibration, COLLECTOR_VERSION)
    with safe_open(path, "pt") as stream:
        assert not [name for name in stream.keys() if "expert" in name]  # noqa: SIM118


# Scores and plans


def test_each_expert_keeps_its_own_best_neurons_and_allocators_see_slots():
    model = SPARSE["mixtral"].build()
    view, statistics = resolve(model), calibrated(model)
    scores = score(view, statistics, Magnitude())
    for block in view.blocks:
        own = block.module.mlp.experts.down_proj.detach().norm(dim=1).double()
        assert torch.allclose(scores.experts[block.index], own)
        assert torch.allclose(scores.neurons[block.index], own.sort(dim=1, descending=True).values.sum(0))
    plan = cfsp.prune(model, IDS, pruner="magnitude_sp", ratio=0.4, round_to=ROUND)
    for block, decision in zip(view.blocks, plan.blocks, strict=True):
        own = block.module.mlp.experts.down_proj.detach().norm(dim=1)
        for expert, kept in enumerate(decision.expert_neurons_kept):
            assert list(kept) == own[expert].topk(len(kept)).indices.sort().values.tolist()


def test_cfsp_scores_an_expert_by_its_own_three_matrices():
    model = SPARSE["mixtral"].build()
    statistics = calibrated(model)
    experts = model.model.layers[1].mlp.experts
    found = score(resolve(model), statistics, Cfsp()).experts[1]
    for expert in range(6):
        x = statistics.blocks[1].ffn.rms[expert].float()
        gate, up = experts.gate_up_proj.detach()[expert].abs().chunk(2)
        down = experts.down_proj.detach()[expert].abs()
        shares = (down * x / (down @ x)[:, None]).sum(0) + (up / up.sum(0)).sum(1) + (gate / gate.sum(0)).sum(1)
        assert torch.allclose(found[expert].float(), shares * x / x.sum(), rtol=1e-4)


def test_random_scores_are_drawn_for_each_expert_alone():
    model = SPARSE["mixtral"].build()
    found = score(resolve(model), calibrated(model), RandomImportance(1)).experts
    assert len({tuple(row.tolist()) for block in found for row in block}) == 6 * BLOCKS


@pytest.mark.parametrize("name", ["mixtral", "mixtral_modules", "gpt_oss"])
def test_gradient_terms_of_experts_are_those_of_the_whole_loss(name):
    from cfsp.calibration.gradients import VARIANTS, gradient_terms

    a = SPARSE[name]
    model, ids = a.build(), IDS[:3]
    terms, _ = gradient_terms(BlockDriver(resolve(model), 1), from_ids(ids, Limits(VOCABULARY, None)))
    loss = torch.stack(
        [F.cross_entropy(model(one[None]).logits[0, :-1].float(), one[1:]) for one in ids]
    ).mean()  # fmt: skip
    loss.backward()
    experts = model.model.layers[2].mlp.experts
    for expert in range(6):
        if name == "mixtral_modules":
            term = experts[expert].down_proj.weight * experts[expert].down_proj.weight.grad
        else:
            term = (experts.down_proj * experts.down_proj.grad)[expert]
            term = term.T if a.experts.transposed else term
        found = terms.blocks[2]["down"][VARIANTS.index("element1"), expert]
        assert torch.allclose(found.float(), term.detach().abs().sum(0), rtol=1e-3, atol=1e-7)


def test_a_plan_of_a_dense_model_says_nothing_of_experts():
    text = cfsp.prune(tiny_model(), tokens(), ratio=0.3, round_to=8).to_json()
    assert "expert" not in text
    assert json.loads(text)["blocks"][0].keys() == {"ffn_kept", "kv_groups_kept", "attention", "ffn"}


def test_plans_of_experts_and_of_their_neurons_compose():
    a = SPARSE["mixtral"]
    model, both = a.build(), a.build()
    first = hand_plan(
        *[BlockPlan(experts_kept=(0, 2, 3, 5), expert_neurons_kept=tuple(tuple(range(i, 32 + i)) for i in range(4)))]
        * 4
    )
    second = hand_plan(
        *[BlockPlan(experts_kept=(1, 3), expert_neurons_kept=(tuple(range(0, 32, 2)), tuple(range(1, 32, 2))))] * 4
    )
    cfsp.apply(cfsp.apply(model, first), second)
    composed = second.compose(first)
    assert composed.blocks[0].experts_kept == (2, 5)
    assert composed.blocks[0].expert_neurons_kept[0] == tuple(range(1, 33, 2))
    assert composed.blocks[0].expert_neurons_kept[1] == tuple(range(4, 36, 2))
    assert torch.equal(logits(cfsp.apply(both, composed), SHORT), logits(model, SHORT))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"experts_kept": (0, 9)}, "keeps expert 9, the model has 6"),
        ({"expert_neurons_kept": ((0, 1),) * 5}, "neurons of 5 experts, the model has 6"),
        ({"expert_neurons_kept": ((0, 41),) * 6}, "keeps neuron 41, the model has 40"),
        ({"ffn_kept": (0, 1)}, "keeps neuron 1, the model has 0"),
        ({"experts_kept": (3,)}, "its router needs 2"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(kept, message):
    with pytest.raises(CfspError, match=message):
        cfsp.apply(SPARSE["mixtral"].build(), hand_plan(BlockPlan(**kept), *[BlockPlan()] * 3))


@pytest.mark.parametrize("neurons", [((0, 1), (0,)), ((0, 1),), ()])
def test_a_plan_with_unequal_lists_is_none(neurons):
    with pytest.raises(CheckpointError, match="equal length"):
        BlockPlan(experts_kept=(0, 1), expert_neurons_kept=neurons)


# Whole experts


def of_experts(tokens_of: list[int], contribution: list[float]) -> BlockStatistics:
    nothing = InputStatistics(*[torch.zeros(len(tokens_of), 1)] * 3)
    found = ExpertStatistics(torch.tensor(tokens_of).double(), torch.tensor(contribution).double())
    return BlockStatistics({"angular": 0.1}, nothing, None, found)


@pytest.mark.parametrize(("kind", "field"), [("routed_share", "tokens"), ("contribution", "contribution")])
def test_the_experts_with_the_lowest_score_go(kind, field):
    model = SPARSE["mixtral"].build()
    overrides = ["pruner.structure=experts", f"pruner.expert_score={kind}"]
    plan = cfsp.prune(model, IDS, ratio=0.35, overrides=overrides)
    for decision, found in zip(plan.blocks, calibrated(model).blocks, strict=True):
        if decision.experts_kept is not None:
            best = getattr(found.experts, field).argsort(descending=True, stable=True)[: len(decision.experts_kept)]
            assert list(decision.experts_kept) == sorted(best.tolist())
    assert plan.method["pruner"]["expert_score"] == kind
    assert "importance" not in plan.method


@sparse
@torch.no_grad()
def test_reap_is_the_mean_over_the_tokens_that_were_routed_to_the_expert(architecture):
    """Token by token, from the router and the matrices themselves."""
    a = architecture
    model = a.build()
    scores = score_whole_experts(resolve(model), calibrated(model), "reap").neurons
    for index, block in enumerate(a.blocks_of(model)):
        if not a.is_sparse(index):
            assert len(scores[index]) == 0
            continue
        mixture = block.get_submodule(a.ffn_path)
        states = entering(mixture, model, IDS)
        chosen, weights = routed(a, mixture, states)
        for expert in range(a.experts.n):
            norms = []
            outputs = expert_by_hand(a, mixture, expert, states)[1]
            for token, (own, by) in enumerate(zip(chosen.tolist(), weights, strict=True)):
                if expert in own:
                    norms.append(float(by[own.index(expert)]) * float(outputs[token].double().norm()))
            expected = sum(norms) / len(norms) if norms else 0.0
            assert float(scores[index][expert]) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_reap_keeps_a_rare_expert_that_does_much_for_its_tokens():
    view = resolve(SPARSE["mixtral"].build())
    row = of_experts([0, 2, 40, 8, 10, 20], [0.0, 0.2, 1.0, 0.1, 0.1, 0.1])
    found = Statistics((row,) * BLOCKS, 2, 20)
    assert score_whole_experts(view, found, "reap").neurons[0].tolist() == pytest.approx([0, 4, 1, 0.5, 0.4, 0.2])
    assert score_whole_experts(view, found, "contribution").neurons[0].argmax() == 2


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral_modules"])
def test_experts_chosen_by_reap_are_masked_as_they_are_sliced(name):
    a = SPARSE[name]
    model = a.build()
    words = ["pruner.structure=experts", "pruner.expert_score=reap", "allocator=uniform"]
    plan = cfsp.prune(model, IDS, ratio=0.35, overrides=words)
    assert any(block.experts_kept is not None for block in plan.blocks)
    masked = masked_logits(a, plan, SHORT)
    found = logits(cfsp.apply(model, plan), SHORT)
    assert (found - masked).abs().max() <= 1e-4 * masked.abs().max()


def test_every_group_of_the_router_loses_as_many_experts():
    block = resolve(SPARSE["deepseek_v3_groups"].build()).blocks[1]
    scores = torch.tensor([9.0, 8, 7, 6, 1, 2, 3, 4])
    assert best_experts(block, scores, 4, None, "prune").experts_kept == (0, 1, 6, 7)
    assert best_experts(block, scores, 8, None, "prune") == BlockPlan()


def unseen_model():
    """GPT-OSS whose router never chooses expert 1 of block 0, nor 0 and 5 of block 2."""
    model = SPARSE["gpt_oss"].build()
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[1] = -1e4
        model.model.layers[2].mlp.router.bias[[0, 5]] = -1e4
    return model


def test_an_expert_without_tokens_is_reported_and_ranked_by_its_weights(caplog):
    model = unseen_model()
    with caplog.at_level(logging.WARNING, "cfsp"):
        plan = cfsp.prune(model, IDS, pruner="uniform", ratio=0.4, round_to=ROUND)
    unseen = {block: experts for block, experts in plan.notes["unseen_experts"].items() if block in "02"}
    assert unseen == {"0": [1], "2": [0, 5]}
    lines = [record.getMessage() for record in caplog.records if "saw no calibration token" in record.getMessage()]
    assert len(lines) == 1
    assert plan.details[0]["expert_tokens"][1] == 0
    assert plan.details[0]["expert_contribution"][1] == 0
    experts = model.model.layers[0].mlp.experts
    gate_up, down = experts.gate_up_proj.detach()[1].abs().T, experts.down_proj.detach()[1].abs().T
    gate, up = gate_up[::2], gate_up[1::2]
    shares = (down / down.sum(1, keepdim=True)).sum(0) + (up / up.sum(0)).sum(1) + (gate / gate.sum(0)).sum(1)
    kept = plan.blocks[0].expert_neurons_kept[1]
    assert list(kept) == shares.topk(len(kept)).indices.sort().values.tolist()
    scores = score(resolve(model), calibrated(model), Magnitude())
    seen = scores.experts[0][[0, 2, 3, 4, 5]].sort(dim=1, descending=True).values.sum(0)
    assert torch.allclose(scores.neurons[0], seen), "nothing is known of an unseen expert's share"
    taylor = cfsp.prune(model, IDS, pruner="llm_pruner", ratio=0.3, round_to=ROUND,
                        overrides=["pruner.structure=ffn", "sparsity.protect=none"])  # fmt: skip
    # Weights that leave together: without gradients their L1 norm.
    norms = gate_up.sum(1).view(-1, 2).sum(1) + down.sum(0)
    kept = taylor.blocks[0].expert_neurons_kept[1]
    assert list(kept) == norms.topk(len(kept)).indices.sort().values.tolist()


def test_an_expert_without_tokens_stays_or_goes_first_as_configured():
    model = unseen_model()
    words = ["pruner.structure=experts", "allocator=uniform"]
    keep = cfsp.prune(model, IDS, ratio=0.3, overrides=words)
    prune = cfsp.prune(model, IDS, ratio=0.3, overrides=[*words, "pruner.unseen_experts=prune"])
    assert 1 in keep.blocks[0].experts_kept
    assert {0, 5} <= set(keep.blocks[2].experts_kept)
    assert 1 not in prune.blocks[0].experts_kept
    assert not {0, 5} & set(prune.blocks[2].experts_kept)
    for plan in (keep, prune):
        cfsp.apply(unseen_model(), plan)


def test_unseen_experts_that_stay_bound_what_can_go():
    from cfsp.sparsity.budget import Sizes

    view = resolve(SPARSE["deepseek_v3_groups"].build())
    sizes = Sizes.of(view, "experts")
    assert sizes.expert_steps[0] == (0, 0)
    assert sizes.expert_steps[1] == (4, 2)
    rows = [of_experts([1] * 8, [1.0] * 8), of_experts([0, 0, 0, 5, 5, 5, 5, 5], [1.0] * 8)]
    found = Statistics((rows[0], rows[1], rows[0], rows[0]), 1, 40)
    assert keep_unseen_experts(view, sizes, found).expert_steps == ((0, 0), (6, 2), (4, 2), (4, 2))


# Folders


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("structure", ["ffn", "experts"])
def test_equal_blocks_are_a_stock_folder_with_the_names_that_stock_tools_read(name, structure, tmp_path):
    a = SPARSE[name]
    model = a.build()
    of_mixture = (
        BlockPlan(expert_neurons_kept=tuple(tuple(range(i, i + 24)) for i in range(6)))
        if structure == "ffn"
        else BlockPlan(experts_kept=(0, 2, 5))
    )
    cfsp.apply(model, hand_plan(*[of_mixture if a.is_sparse(i) else BlockPlan() for i in range(BLOCKS)]))
    saved = save_checkpoint(model, tmp_path / "ours")
    assert saved.form == "plain"
    assert model.config.model_type == a.model_type
    model.save_pretrained(tmp_path / "theirs")
    shapes = []
    for folder in ("ours", "theirs"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as stream:
            shapes.append({key: tuple(stream.get_slice(key).get_shape()) for key in stream.keys()})  # noqa: SIM118
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe", "deepseek_v2"])
@pytest.mark.parametrize("gone", range(3))
def test_blocks_that_go_do_not_mix_up_which_are_mixtures(name, gone, tmp_path):
    model = SPARSE[name].build()
    stays = [block != gone for block in range(BLOCKS)]
    cfsp.apply(model, hand_plan(*[BlockPlan(attention=there, ffn=there) for there in stays]))
    save_checkpoint(model, tmp_path / "model")
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert (logits(again, SHORT) - logits(model, SHORT)).abs().max() < 1e-4


# Views and refusals


@sparse
def test_a_mixture_is_recognised_with_its_numbers(architecture):
    a = architecture
    view = resolve(a.build())
    probe(view, experts=True)
    for index, block in enumerate(view.blocks):
        assert (block.experts is not None) == a.is_sparse(index)
        if not a.is_sparse(index):
            assert block.ffn.width == a.width
            continue
        mixture, said = block.experts, a.experts
        assert (mixture.n_experts, mixture.top_k, mixture.groups) == (said.n, said.top_k, said.groups)
        assert mixture.width == said.width
        assert (mixture.shared.width if mixture.shared else 0) == said.shared_width
        assert mixture.parameters == said.n * said.width * 3 * a.hidden + said.biases * said.n * (80 + a.hidden)
        assert "ffn" not in block.channels


def test_a_mixture_that_is_not_understood_is_never_taken_for_its_shared_expert():
    model = SPARSE["deepseek_v3"].build()
    mixture = model.model.layers[1].mlp
    mixture.gate.weight = nn.Parameter(mixture.gate.weight[:, :-1])
    with pytest.raises(UnsupportedModelError, match="matrices of several experts"):
        resolve(model)


def test_the_probe_sees_experts_that_compute_something_else():
    model = SPARSE["mixtral"].build()
    experts = model.model.layers[0].mlp.experts
    experts.is_concatenated = False
    with pytest.raises(UnsupportedModelError, match="looks like a mixture of 6 experts"):
        probe(resolve(model))


def refusal(name: str, *overrides: str, pruner: str = "cfsp", round_to: int = ROUND) -> str:
    with pytest.raises(CfspError) as caught:
        cfsp.prune(SPARSE[name].build(), IDS, pruner=pruner, ratio=0.3, round_to=round_to, overrides=overrides)
    (line,) = caught.value.problems
    return line


def test_refusals_say_what_and_the_way_out():
    for name in ("deepseek_v2", "deepseek_v3"):
        for pruner in ("llm_pruner", "flap_al_am"):
            said = refusal(name, pruner=pruner)
            assert "multi-head latent attention" in said
            assert "pruner.structure=ffn" in said
    said = refusal("mixtral", round_to=12)
    assert "sparsity.round_to=12" in said
    assert "sparsity.round_to=16" in said
    assert "sparsity.round_to=16" in refusal("mixtral", round_to=12, pruner="two_ssp")
    said = refusal("gpt_oss", "sparsity.scope=decoder", pruner="block_pruner")
    assert "pruner.submodules=attention" in said


def test_settings_that_do_not_go_together_are_refused():
    for words, parts in (
        (["pruner.structure=experts", "pruner.compensation=bias"], ("pruner.compensation=bias", "none")),
        (["pruner.unseen_experts=prune"], ("pruner.unseen_experts=prune", "pruner.structure=experts")),
        (["pruner.structure=experts", "pruner.sequential=true"], ("pruner.sequential=true",)),
        (["pruner.structure=experts", "importance=wanda"], ("importance", "pruner.expert_score")),
        (["pruner.structure=experts", "allocator=search"], ("allocator", "use allocator=coarse")),
    ):
        with pytest.raises(ConfigError) as caught:
            cfsp.prune(SPARSE["mixtral"].build(), IDS, overrides=words)
        assert all(part in str(caught.value) for part in parts), caught.value
    with pytest.raises(UnsupportedModelError, match="no block is one"):
        cfsp.prune(tiny_model(), tokens(), overrides=["pruner.structure=experts"])
    with pytest.raises(BudgetError, match="experts that must stay"):
        cfsp.prune(SPARSE["mixtral"].build(), IDS, ratio=0.8, overrides=["pruner.structure=experts"])


def test_experts_that_are_modules_may_have_any_width():
    model = SPARSE["mixtral_modules"].build()
    plan = cfsp.prune(model, IDS, ratio=0.3, round_to=3)
    assert any(len(block.expert_neurons_kept[0]) % 8 for block in plan.blocks if block.expert_neurons_kept)
    assert logits(cfsp.apply(model, plan), SHORT).isfinite().all()


def test_two_ssp_checks_mixtures_before_anything_runs():
    from cfsp.pruner.two_ssp import TwoSSP

    with pytest.raises(BudgetError, match="round_to=4"):
        TwoSSP("two_ssp").check(resolve(SPARSE["mixtral"].build()), Budget(0.4, "decoder", round_to=4))


@sparse
def test_inspect_needs_no_weights(architecture):
    """What each pruner could remove, and the words for it, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from cfsp.inspection.describe import describe_blocks
    from cfsp.inspection.reach import reaches
    from cfsp.inspection.show import describe_attention, describe_ffn

    a = architecture
    a.build()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(a.model_type, **a.settings))
    view = resolve(model)
    found = {reach.pruner: reach for reach in reaches(view)}
    assert found["cfsp"].largest_ratio is not None
    assert found["block_pruner"].reason == "" or a.attention == "mla"
    neurons = sum((a.experts.n * EXPERT_WIDTH) if a.is_sparse(i) else a.width for i in range(BLOCKS))
    assert found["cfsp"].units == {"neurons": neurons}
    facts = describe_blocks(view, None)
    index = next(i for i in range(BLOCKS) if a.is_sparse(i))
    words = describe_ffn(facts[index].ffn)
    assert words.startswith(f"mixture of experts, {a.experts.n}")
    assert f"{EXPERT_WIDTH} neurons (" in words
    assert ("shared" in words) == bool(a.experts.shared)
    assert facts[index].as_dict()["ffn"]["experts"]["top_k"] == a.experts.top_k
    assert ("multi-head latent" in describe_attention(facts[index])) == (a.attention == "mla")
    for i, fact in enumerate(facts):
        assert ("experts" in fact.as_dict()["ffn"]) == a.is_sparse(i)
