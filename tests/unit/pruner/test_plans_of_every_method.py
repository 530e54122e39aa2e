"""Properties of plans and their application: every method on every architecture."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch

import cfsp
from cfsp.architecture.views import resolve
from cfsp.errors import BudgetError, CheckpointError, ConfigError, DataError, UnsupportedModelError
from cfsp.plan import slicing
from cfsp.plan.pruning_plan import BlockPlan, PruningPlan
from cfsp.pruner.probe import probe
from tests.helpers.matrix import pairwise
from tests.helpers.tiny import ARCHITECTURES, tiny_model, tokens

FFN_PRUNERS = ("cfsp", "uniform", "magnitude_sp", "wanda_sp", "random", "flap")
HEAD_PRUNERS = ("flap_al_am", "wanda_sp_sequential", "llm_pruner")
DEPTH_PRUNERS = ("two_ssp", "shortgpt", "sliding_window", "block_pruner")
MODELS = (*ARCHITECTURES, "llama_bias", "gemma2", "olmo2")
#: What a structure is called, and the words that make the engine prune it.
HEADS = ["sparsity.scope=decoder", "pruner.structure=heads_ffn"]
ONLY_HEADS = ["sparsity.scope=decoder", "pruner.structure=heads"]


def masked_logits(model, plan, ids):
    """Logits with what the plan removes nulled by hooks: nothing of the slicer is used."""
    handles = []
    for index, (layer, block) in enumerate(zip(model.model.layers, plan.blocks, strict=True)):
        attention, mlp = layer.self_attn, layer.mlp
        if not block.attention and not block.ffn:
            handles.append(layer.register_forward_hook(lambda _, args, out: args[0]))
            continue
        if not block.attention:
            handles.append(attention.register_forward_hook(lambda _, args, out: (torch.zeros_like(out[0]), *out[1:])))
        if not block.ffn:
            handles.append(mlp.register_forward_hook(lambda _, args, out: torch.zeros_like(out)))
        groups = None if block.kv_groups_kept is None else torch.tensor(block.kv_groups_kept)
        neurons = None if block.ffn_kept is None else torch.tensor(block.ffn_kept)
        if groups is not None:
            groups = (groups[:, None] * 16 + torch.arange(16)).flatten()  # 2 query heads of 8 channels read a group
        for kind, linear, kept in (("attention", attention.o_proj, groups), ("ffn", mlp.down_proj, neurons)):
            bias = plan.tensors.get(f"blocks.{index}.{kind}.bias")
            if kept is not None:
                mask = torch.zeros(linear.in_features)
                mask[kept] = 1
                handles.append(linear.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,)))
            if bias is not None:
                extra = bias if linear.bias is None else bias - linear.bias.detach()
                handles.append(linear.register_forward_hook(lambda _, args, out, extra=extra: out + extra))
    with torch.no_grad():
        logits = model(ids).logits
    for handle in handles:
        handle.remove()
    return logits


def assert_masked_equals_sliced(model, plan, ids):
    expected = masked_logits(model, plan, ids)
    sliced = cfsp.apply(copy.deepcopy(model), plan)
    with torch.no_grad():
        found = sliced(ids).logits
    # Both run the same fp32 kernels on matrices of other shapes: only the order of sums differs.
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    return sliced


def unit_of(plan, model, round_to) -> int:
    """The removable unit that a plan's budget may be off by: a step of one block, or what its method removes whole."""
    layer = model.model.layers[0]
    step = round_to * 3 * 32
    if plan.method["name"] in ("shortgpt", "sliding_window"):
        return sum(p.numel() for p in layer.parameters())
    if plan.method["name"] == "block_pruner":
        return sum(p.numel() for p in layer.mlp.parameters())
    # 2SSP keeps the same width everywhere, by Eq. 5 and without the norms; the others fill up with neurons.
    return len(plan.blocks) * (step + 64) if plan.method["name"] == "two_ssp" else step


@pytest.mark.parametrize(
    ("pruner", "architecture", "ratio"),
    pairwise([*FFN_PRUNERS, *HEAD_PRUNERS, *DEPTH_PRUNERS], ARCHITECTURES, [0.2, 0.5]),
)
def test_every_pruner_on_every_architecture(pruner, architecture, ratio, tmp_path):
    """Budget met, finite, model untouched, deterministic, masked == sliced, saved and reloaded with equal logits."""
    from transformers import AutoModelForCausalLM

    from cfsp.checkpoint.save import save_checkpoint

    model = tiny_model(architecture, blocks=6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scope = "ffn" if pruner in FFN_PRUNERS else "decoder"
    plans = [
        cfsp.prune(model, tokens(), pruner=pruner, ratio=ratio, scope=scope, round_to=8, overrides=["seed=3"])
        for _ in range(2)
    ]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "model was touched"
    assert all("forward" not in vars(m) and not m._forward_hooks for m in model.modules()), "something was left behind"
    plan = plans[0]
    assert plans[1] == plan
    sliced = assert_masked_equals_sliced(model, plan, tokens(2, seed=1))
    counted = sum(parameter.numel() for parameter in sliced.parameters())
    assert plan.parameters["after"] == counted, "the plan states another size than the model has"
    layer = model.model.layers
    whole = 6 * 3 * 32 * 96 if scope == "ffn" else sum(p.numel() for p in layer.parameters())
    added = 0 if scope == "ffn" else plan.achieved["added_parameters"]
    assert abs(plan.achieved["removed_parameters"] - added - ratio * whole) <= unit_of(plan, model, 8)
    assert plan.achieved["ratio"] == pytest.approx((plan.achieved["removed_parameters"] - added) / whole)
    save_checkpoint(sliced, tmp_path / "model", files=plan.files())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        logits = sliced(tokens(2, seed=1)).logits
        assert logits.isfinite().all()
        assert torch.equal(reloaded(tokens(2, seed=1)).logits, logits)
    replayed = cfsp.apply(copy.deepcopy(model), cfsp.PruningPlan.load(plan.save(tmp_path / "plan.json"))).state_dict()
    assert replayed.keys() == sliced.state_dict().keys()
    assert all(torch.equal(value, replayed[name]) for name, value in sliced.state_dict().items())


@pytest.mark.parametrize("architecture", ["llama_bias", "gemma2", "olmo2"])
@pytest.mark.parametrize("pruner", FFN_PRUNERS)
def test_masked_equals_sliced_in_the_other_families(pruner, architecture):
    model = tiny_model(architecture)
    plan = cfsp.prune(model, tokens(), pruner=pruner, ratio=0.4, round_to=8)
    sliced = assert_masked_equals_sliced(model, plan, tokens(2, seed=1))
    widths = [96 if block.ffn_kept is None else len(block.ffn_kept) for block in plan.blocks]
    assert [layer.mlp.down_proj.in_features for layer in sliced.model.layers] == widths
    assert all(width % 8 == 0 for width in widths)
    assert plan.parameters["after"] == sum(parameter.numel() for parameter in sliced.parameters())
    assert abs(sum(widths) - 0.6 * 4 * 96) <= 8


METRICS = (
    "cfsp", "cfsp_released", "magnitude", "wanda", "activation_norm", "sequence_norm", "flap", "random", "taylor",
    "weight_norm",
)  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "allocator", "structure", "compensation"),
    pairwise(METRICS, ["uniform", "coarse", "global_rank"], ["ffn", "heads", "heads_ffn"], ["none", "bias"]),
)
def test_any_metric_with_any_allocator_structure_and_compensation(metric, allocator, structure, compensation):
    model = _llama()
    words = [f"importance={metric}", f"allocator={allocator}", f"pruner.compensation={compensation}"]
    ratio = 0.1 if structure == "heads" else 0.4
    plan = cfsp.prune(
        model, tokens(), "one_shot", ratio, "decoder", 8, overrides=[*words, f"pruner.structure={structure}"]
    )
    step = 2 * 32 * 8 * 3 if structure == "heads" else 8 * 3 * 32
    assert abs(plan.achieved["ratio"] - ratio) * sum(p.numel() for p in model.model.layers.parameters()) <= step
    assert any(b.kv_groups_kept for b in plan.blocks) or structure == "ffn" or allocator == "global_rank"
    assert all(b.ffn_kept is None for b in plan.blocks) == (structure == "heads")
    assert bool(plan.tensors) == (compensation == "bias")
    assert_masked_equals_sliced(model, plan, tokens(2, seed=1))


@functools.cache
def _llama():
    return tiny_model()


def test_bias_compensation_restores_the_mean_output():
    """After FLAP's compensation, the mean output of each FFN on the calibration set is the dense one's (block 0)."""
    model, ids = tiny_model(), tokens()
    plan = cfsp.prune(model, ids, "flap_al_am", 0.4, round_to=8)
    assert plan.blocks[0].ffn_kept is not None

    def mean_output(model):
        seen = []
        handle = model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda _, args, out: seen.append(out))
        with torch.no_grad():
            model(ids)
        handle.remove()
        return seen[0].flatten(0, 1).mean(0)

    dense = mean_output(model)
    without = dataclasses.replace(plan, tensors={}, compensation="")
    compensated, bare = (cfsp.apply(copy.deepcopy(model), p) for p in (plan, without))
    if plan.blocks[0].kv_groups_kept is not None:
        assert torch.allclose(mean_output(compensated), dense, atol=1e-5)
        assert not torch.allclose(mean_output(bare), dense, atol=1e-3)
    smaller = [sum(p.numel() for p in m.parameters()) for m in (compensated, bare)]
    assert smaller[0] == plan.parameters["after"]
    assert smaller[0] - smaller[1] == 32 * len(plan.tensors)


@pytest.mark.parametrize("compensation", ["none", "bias"])
def test_sequential_chooses_on_what_the_pruned_blocks_give(compensation):
    """Recomputed block by block from a model whose earlier blocks are pruned by the plan."""
    from cfsp.calibration.calibrate import calibrate
    from cfsp.calibration.calibration_set import CalibrationSet
    from cfsp.importance.base import score_block
    from cfsp.importance.wanda import Wanda
    from cfsp.model.driver import BlockDriver

    model, ids = tiny_model(), tokens()
    words = [f"pruner.compensation={compensation}"]
    plan = cfsp.prune(model, ids, "wanda_sp_sequential", 0.4, round_to=8, overrides=words)
    dense = cfsp.prune(
        model, ids, "wanda_sp_sequential", 0.4, round_to=8, overrides=[*words, "pruner.sequential=false"]
    )
    assert plan.blocks[0] == dense.blocks[0]
    assert plan.blocks[1:] != dense.blocks[1:]
    for index, decision in enumerate(plan.blocks):
        earlier = tuple(b if i < index else BlockPlan() for i, b in enumerate(plan.blocks))
        tensors = {name: value for name, value in plan.tensors.items() if int(name.split(".")[1]) < index}
        so_far = dataclasses.replace(plan, blocks=earlier, tensors=tensors, compensation="")
        view = resolve(cfsp.apply(copy.deepcopy(model), so_far))
        statistics, _ = calibrate(BlockDriver(view, 8), CalibrationSet(ids, "", "", 0))
        neurons, groups = score_block(view.blocks[index], statistics.blocks[index], Wanda(), "heads_ffn")
        kept = decision.ffn_kept or tuple(range(96))
        assert set(neurons.argsort(descending=True)[: len(kept)].tolist()) == set(kept)
        kept = decision.kv_groups_kept or (0, 1)
        assert set(groups.sum(1).argsort(descending=True)[: len(kept)].tolist()) == set(kept)


def test_protected_blocks_are_not_touched():
    model = tiny_model(blocks=5)
    for pruner in ("llm_pruner", "cfsp", "flap_al_am", "shortgpt", "block_pruner"):
        plan = cfsp.prune(model, tokens(), pruner, 0.2, "decoder", 8, overrides=["sparsity.protect=[1,2]"])
        assert plan.blocks[0] == plan.blocks[3] == plan.blocks[4] == BlockPlan(), pruner
        assert plan.blocks[1] != BlockPlan() or plan.blocks[2] != BlockPlan()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pruner=cfsp", "pruner.structure=heads_ffn"], "sparsity.scope=ffn.*use sparsity.scope=decoder"),
        (["pruner=shortgpt", "pruner.compensation=bias"], "pruner.compensation=bias.*no output projection.*flap"),
        (["pruner=block_pruner", "pruner.compensation=bias"], "no output projection"),
        (["pruner=two_ssp", "importance=wanda"], "pruner=two_ssp.*does not use importance"),
        (["pruner=shortgpt", "allocator=uniform"], "does not use allocator.*pruner=one_shot"),
        (["pruner=llm_pruner", "sparsity.ratio=0.9"], "sparsity.protect=auto removes .* at most"),
        (["pruner=llm_pruner", "pruner.sequential=true"], "pruner.sequential=true.*gradients.*pruner.sequential=false"),
        (["pruner=llm_pruner", "sparsity.protect=[2,2]"], "leaves no block of 4"),
        (["pruner=two_ssp", "sparsity.protect=auto"], "sparsity.protect"),
        (["pruner=two_ssp", "sparsity.scope=ffn"], "pruner=two_ssp removes attention too.*scope=decoder or model"),
        (["pruner=shortgpt", "sparsity.scope=ffn"], "pruner=shortgpt removes attention too"),
        (["pruner=block_pruner", "sparsity.scope=ffn"], "or pruner.submodules=ffn"),
        (
            ["pruner=one_shot", "pruner.structure=heads", "sparsity.scope=decoder"],
            "going down to one KV group in a block removes .* at most.*or pruner.structure=heads_ffn",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_combinations_say_what_would_work(words, message):
    pruner = words[0].removeprefix("pruner=")
    with pytest.raises((ConfigError, BudgetError), match=message):
        cfsp.prune(tiny_model(), tokens(), pruner, 0.5, round_to=8, overrides=words[1:])


@pytest.mark.parametrize("ratio", [0.2, 0.35, 0.5])
@pytest.mark.parametrize("pruner", ["llm_pruner", "magnitude_sp", "wanda_sp_sequential"])
def test_uniform_is_the_same_share_of_every_pruned_block(pruner, ratio):
    """Neurons of a block make up for what its whole KV groups round off: blocks differ by a step of neurons at most."""
    model = tiny_model("qwen2", blocks=8)
    plan = cfsp.prune(model, tokens(), pruner, ratio, "decoder", 8, overrides=HEADS)
    gone = []
    for block in plan.blocks:
        groups = 2 - len(block.kv_groups_kept or (0, 1))
        gone.append((96 - len(block.ffn_kept or range(96))) * 96 + groups * (32 * 8 * 6 + 32))
    free = gone[1:-1] if pruner == "llm_pruner" else gone
    assert max(free) - min(free) <= 8 * 96
    assert len({len(block.kv_groups_kept or (0, 1)) for block in plan.blocks[1:-1]}) == 1


@pytest.mark.parametrize("pruner", ["flap", "flap_al_am"])
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_added_biases_count_where_everything_counts(pruner, ratio):
    """In the decoder's scope the budget is met with the biases; in the FFN's it is about neurons alone."""
    model = tiny_model(blocks=6)
    decoder = sum(p.numel() for p in model.model.layers.parameters())
    plan = cfsp.prune(model, tokens(), pruner, ratio, "decoder", 1)
    net = plan.parameters["before"] - plan.parameters["after"]
    assert plan.achieved["added_parameters"] == 32 * len(plan.tensors) > 0
    assert plan.achieved["removed_parameters"] - plan.achieved["added_parameters"] == net
    assert plan.achieved["ratio"] == plan.achieved["decoder_ratio"] == net / decoder
    # A neuron, and the biases reckoned with that a block which loses nothing of a kind does not get.
    outputs = 6 if pruner == "flap" else 12
    assert abs(net - ratio * decoder) <= 96 + 32 * (outputs - len(plan.tensors))
    if pruner == "flap":
        neurons = cfsp.prune(model, tokens(), pruner, ratio, "ffn", 1)
        assert neurons.achieved["ratio"] == neurons.achieved["ffn_ratio"]
        assert abs(neurons.achieved["ffn_ratio"] - ratio) * 6 * 96 <= 1


def test_a_plan_of_another_attention_is_refused():
    model = tiny_model()
    plan = cfsp.prune(model, tokens(), "flap_al_am", 0.4, round_to=8)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight += 1
    with pytest.raises(CheckpointError, match="made for"):
        cfsp.apply(model, plan)


@pytest.mark.parametrize("pruner", ["llm_pruner", "block_pruner"])
def test_a_forward_that_somebody_put_on_a_module_stays(pruner):
    """As accelerate does where it spreads a model over devices."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = tiny_model(blocks=6)
    wrapped = [module for layer in model.model.layers for module in (layer, layer.self_attn, layer.mlp)]
    for module in wrapped:
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    before = [vars(module)["forward"] for module in wrapped]
    cfsp.prune(model, tokens(), pruner, 0.3, round_to=8)
    assert [vars(module).get("forward") for module in wrapped] == before


def test_heads_whose_channels_are_normalised_together_are_refused():
    """OLMo 2 normalises all query heads at once: removing one changes the others."""
    with pytest.raises(
        UnsupportedModelError, match="KV groups.*q_norm.*of several heads together.*pruner.structure=ffn"
    ):
        cfsp.prune(tiny_model("olmo2"), tokens(), "flap_al_am", 0.3, round_to=8)


@pytest.mark.parametrize("which", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_a_planted_error_in_the_slicing_of_heads_is_noticed(which, monkeypatch):
    """One projection of the attention takes the channels of the wrong group."""
    model = tiny_model("qwen2")
    plan = cfsp.prune(model, tokens(), "magnitude_sp", 0.3, round_to=8, scope="decoder", overrides=HEADS)
    assert any(block.kv_groups_kept for block in plan.blocks)
    right = slicing.slice_attention

    def wrong(attention, kept):
        linear = getattr(attention.module, which)
        right(attention, kept)
        good = getattr(attention.module, which)
        other = torch.tensor([g for g in range(attention.n_kv_heads) if g not in kept.tolist()])
        size = attention.head_dim * (attention.queries_per_group if which in ("q_proj", "o_proj") else 1)
        shifted = (other[:, None] * size + torch.arange(size)).flatten()
        axis = {"columns": shifted} if which == "o_proj" else {"rows": shifted}
        setattr(attention.module, which, slicing.slice_linear(linear, **axis))
        assert getattr(attention.module, which).weight.shape == good.weight.shape

    monkeypatch.setattr("cfsp.plan.slice_block.slice_attention", wrong)
    with pytest.raises(AssertionError):
        assert_masked_equals_sliced(model, plan, tokens(2, seed=1))
    monkeypatch.setattr("cfsp.pruner.probe.slice_attention", wrong)
    with pytest.raises(UnsupportedModelError, match="not understood"):
        probe(resolve(model), heads=True)


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("mistake", ["other block", "kept", "norm"])
def test_a_planted_error_in_the_removal_of_submodules_is_noticed(kind, mistake, monkeypatch):
    """The wrong block loses it, nobody does, or its neighbour's norm goes with it."""
    from cfsp.pruner.submodules import remove_submodule

    model = tiny_model("qwen3")
    gone = BlockPlan(attention=kind != "attention", ffn=kind != "mlp")
    plan = PruningPlan("m", "f", {}, (BlockPlan(), gone, BlockPlan(), BlockPlan()), {}, {})
    assert_masked_equals_sliced(model, plan, tokens(2, seed=1))

    def wrong(view, block, kind):
        if mistake == "norm":
            remove_submodule(view, block, kind)
            norm = "post_attention_layernorm" if kind == "attention" else "input_layernorm"
            setattr(block.module, norm, torch.nn.Identity())
        elif mistake == "other block":
            remove_submodule(view, view.blocks[2], kind)

    monkeypatch.setattr("cfsp.pruner.apply.remove_submodule", wrong)
    with pytest.raises(AssertionError):
        assert_masked_equals_sliced(model, plan, tokens(2, seed=1))


@pytest.mark.parametrize("which", ["gate", "up", "down"])
def test_a_planted_slicing_error_is_noticed(which, monkeypatch):
    """The masked-against-sliced check must fail when the slicer takes the wrong row or column."""
    model = tiny_model("llama_bias")
    plan = cfsp.prune(model, tokens(), ratio=0.4, round_to=8)
    right = slicing.slice_ffn

    def wrong(ffn, kept):
        projection = ffn.projections[which]
        linear = projection.module
        right(ffn, kept)
        shifted = kept.roll(1)
        axis = {"columns": shifted} if which == "down" else {"rows": shifted}
        setattr(ffn.module, projection.name, slicing.slice_linear(linear, **axis))

    monkeypatch.setattr("cfsp.plan.slice_block.slice_ffn", wrong)
    with pytest.raises(AssertionError):
        assert_masked_equals_sliced(model, plan, tokens(2, seed=1))
    monkeypatch.setattr("cfsp.pruner.probe.slice_ffn", wrong)
    with pytest.raises(UnsupportedModelError, match="not understood"):
        probe(resolve(model))


@pytest.mark.parametrize("architecture", MODELS)
def test_plan_survives_json_and_replays_bit_for_bit(architecture, tmp_path):
    model = tiny_model(architecture)
    plan = cfsp.prune(model, tokens(), ratio=0.5, round_to=8)
    read = cfsp.PruningPlan.load(plan.save(tmp_path / "plan.json"))
    assert read == plan
    first = cfsp.apply(copy.deepcopy(model), plan).state_dict()
    again = cfsp.apply(copy.deepcopy(model), read).state_dict()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_same_call_gives_the_same_plan_and_batch_size_hardly_matters():
    model, ids = tiny_model(), tokens(24)
    plans = [cfsp.prune(model, ids, ratio=0.5, round_to=1, batch_size=size) for size in (8, 8, 3)]
    assert plans[0] == plans[1]
    kept = [{(i, k) for i, b in enumerate(plan.blocks) for k in b.ffn_kept} for plan in plans]
    assert len(kept[0] ^ kept[2]) <= 0.001 * 4 * 96


def test_training_mode_and_hooks_are_left_as_they_were():
    model = tiny_model().train()
    cfsp.prune(model, tokens(), ratio=0.5)
    assert model.training
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("scope", ["ffn", "decoder", "model"])
@pytest.mark.parametrize("ratio", [0.05, 0.2])
def test_budget_is_met_within_one_step_in_every_scope(scope, ratio):
    model = tiny_model(width=200, blocks=3)
    plan = cfsp.prune(model, tokens(), ratio=ratio, scope=scope, round_to=16)
    sliced = cfsp.apply(copy.deepcopy(model), plan)
    totals = {
        "ffn": 3 * 200 * 3 * 32,
        "decoder": sum(p.numel() for p in model.model.layers.parameters()),
        "model": sum(p.numel() for p in model.parameters()),
    }
    removed = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in sliced.parameters())
    assert abs(removed - ratio * totals[scope]) <= 16 * 3 * 32
    assert plan.achieved["ratio"] == pytest.approx(removed / totals[scope])
    assert plan.requested["ratio"] == ratio


def test_a_ratio_that_cannot_be_met_names_one_that_can():
    model = tiny_model()
    with pytest.raises(BudgetError, match=r"use sparsity.ratio=([0-9.]+) or less") as caught:
        cfsp.prune(model, tokens(), ratio=0.9, scope="model")
    reachable = float(str(caught.value).split("use sparsity.ratio=")[1].split()[0])
    assert cfsp.prune(model, tokens(), ratio=reachable, scope="model").achieved["ratio"] <= reachable + 0.01


@pytest.mark.parametrize(
    ("earlier", "later"),
    [("cfsp", "cfsp"), ("flap_al_am", "flap_al_am"), ("block_pruner", "flap_al_am"), ("shortgpt", "block_pruner"),
     ("two_ssp", "shortgpt"), ("flap_al_am", "sliding_window")],
)  # fmt: skip
def test_pruning_a_pruned_model_composes(earlier, later):
    model, ids = tiny_model(blocks=6), tokens()
    first = cfsp.prune(model, ids, earlier, ratio=0.25, round_to=8)
    smaller = cfsp.apply(copy.deepcopy(model), first)
    second = cfsp.prune(smaller, ids, later, ratio=0.25, round_to=8)
    twice = cfsp.apply(smaller, second).state_dict()
    at_once = cfsp.apply(copy.deepcopy(model), second.compose(first)).state_dict()
    assert all(torch.equal(twice[name], at_once[name]) for name in twice)


def test_apply_refuses_a_plan_of_another_model(tmp_path):
    plan = cfsp.prune(tiny_model(), tokens(), ratio=0.5)
    with pytest.raises(CheckpointError, match="blocks"):
        cfsp.apply(tiny_model(blocks=3), plan)
    with pytest.raises(CheckpointError, match="keeps neuron"):
        cfsp.apply(tiny_model(width=32), plan)
    other = tiny_model(seed=1)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match="made for"):
        cfsp.apply(other, plan)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    in_bf16 = cfsp.apply(tiny_model().bfloat16(), plan)
    assert in_bf16.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="keeps KV group 2, the model has 2"):
        cfsp.apply(tiny_model(), PruningPlan("m", "f", {}, (BlockPlan(None, (0, 2)), *plan.blocks[1:]), {}, {}))
    with pytest.raises(UnsupportedModelError, match="leaves no attention"):
        cfsp.apply(tiny_model(), PruningPlan("m", "f", {}, (BlockPlan(attention=False),) * 4, {}, {}))


def test_a_plan_without_its_tensors_is_refused(tmp_path):
    model = tiny_model()
    plan = cfsp.prune(model, tokens(), "flap", 0.4)
    path = plan.save(tmp_path / "plan.json")
    other = cfsp.prune(model, tokens(seed=9), "flap", 0.4)
    (tmp_path / "other").mkdir()
    other.save(tmp_path / "other" / "plan.json")
    (tmp_path / "other" / "compensation.safetensors").replace(tmp_path / "compensation.safetensors")
    with pytest.raises(CheckpointError, match="belongs to another plan"):
        cfsp.PruningPlan.load(path)
    (tmp_path / "compensation.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"compensation\.safetensors beside it cannot be read"):
        cfsp.PruningPlan.load(path)
    with pytest.raises(CheckpointError, match="its tensors are not there"):
        cfsp.apply(model, dataclasses.replace(plan, tensors={}))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft 0.21 on transformers 5.23
def test_what_cannot_be_pruned_is_refused_before_anything_changes():
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], r=2))
    plan = cfsp.prune(tiny_model(), tokens(), ratio=0.5)
    widths = [layer.mlp.down_proj.in_features for layer in wrapped.base_model.model.model.layers]
    for refused in (lambda: cfsp.prune(wrapped, tokens()), lambda: cfsp.apply(wrapped, plan)):
        with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
            refused()
    assert [layer.mlp.down_proj.in_features for layer in wrapped.base_model.model.model.layers] == widths
    with pytest.raises(UnsupportedModelError, match=r"transformers is needed"):
        cfsp.prune(torch.nn.Linear(2, 2), tokens())


def test_an_ffn_with_a_part_of_its_own_is_refused():
    """BitNet normalises the neurons inside its FFN: the names are right, the structure is not."""
    with pytest.raises(UnsupportedModelError, match="does not run with one neuron less.*ffn_sub_norm"):
        cfsp.prune(tiny_model("bitnet"), tokens())


def test_a_plan_fits_the_same_weights_wherever_they_come_from(tmp_path):
    from transformers import AutoModelForCausalLM

    from cfsp.checkpoint.save import save_checkpoint
    from cfsp.system.package import ROOT

    folder = tmp_path / "model"
    save_checkpoint(tiny_model(vocab_size=4096), folder, source=ROOT / "assets" / "books7m")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ours, _ = cfsp.load(folder)
    ids = tokens(vocabulary=4096)
    plan, same = cfsp.prune(plain, ids, ratio=0.5), cfsp.prune(ours, ids, ratio=0.5)
    assert plan.blocks == same.blocks
    assert same.base_fingerprint.startswith("sha256:")
    cfsp.apply(ours, plan)
    edited, _ = cfsp.load(folder)
    with torch.no_grad():
        edited.model.layers[0].mlp.up_proj.weight += 1
    assert cfsp.prune(edited, ids, ratio=0.5).base_fingerprint.startswith("memory:")
    with pytest.raises(CheckpointError, match="made for"):
        cfsp.apply(edited, same)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "JSON"), ('{"schema": 9}', "schema 9"), ('{"schema": 1}', "not a pruning plan"), ("[]", "schema")],
)
def test_a_damaged_plan_is_refused(tmp_path, content, message):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        cfsp.PruningPlan.load(tmp_path / "plan.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        cfsp.PruningPlan.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(2, 8), "token ids"),
        (torch.zeros(8, dtype=torch.int64), "token ids"),
        (torch.zeros(0, 8, dtype=torch.int64), "token ids"),
        (torch.full((2, 8), 128), "vocabulary"),
        (torch.full((2, 8), -1), "vocabulary"),
        (torch.zeros(1, 200, dtype=torch.int64), "positions"),
    ],
)
def test_the_api_refuses_wrong_ids(ids, message):
    with pytest.raises(DataError, match=message):
        cfsp.prune(tiny_model(), ids)


def test_the_api_refuses_wrong_settings():
    model = tiny_model()
    with pytest.raises(ConfigError, match="did you mean cfsp"):
        cfsp.prune(model, tokens(), pruner="cfps")
    with pytest.raises(ConfigError, match="sparsity.ratio=1.5"):
        cfsp.prune(model, tokens(), ratio=1.5)
    with pytest.raises(ConfigError, match="allocator.temprature"):
        cfsp.prune(model, tokens(), overrides=["allocator.temprature=2"])
