"""Properties of plans and their application: every method on every architecture."""

from __future__ import annotations

import copy

import pytest
import torch

import cfsp
from cfsp.errors import BudgetError, CheckpointError, ConfigError, DataError, UnsupportedModelError
from cfsp.models.views import resolve
from cfsp.pruning import slicing
from cfsp.pruning.plan import BlockPlan, PruningPlan
from cfsp.pruning.probe import probe
from tests.tiny import ARCHITECTURES, tiny_model, tokens

PRUNERS = ("cfsp", "uniform", "magnitude_sp", "wanda_sp", "random")
MODELS = (*ARCHITECTURES, "llama_bias", "gemma2", "olmo2")


def masked_logits(model, plan, ids):
    """Logits with the removed neurons zeroed by hooks at the input of down_proj: nothing of the slicer is used."""
    handles = []
    for layer, block in zip(model.model.layers, plan.blocks, strict=True):
        if block.ffn_kept is None:
            continue
        mask = torch.zeros(layer.mlp.down_proj.in_features)
        mask[list(block.ffn_kept)] = 1
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,)))
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


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("pruner", PRUNERS)
def test_masked_equals_sliced(pruner, architecture):
    model = tiny_model(architecture)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = cfsp.prune(model, tokens(), pruner=pruner, ratio=0.4, round_to=8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "model was touched"
    sliced = assert_masked_equals_sliced(model, plan, tokens(2, seed=1))
    widths = [96 if block.ffn_kept is None else len(block.ffn_kept) for block in plan.blocks]
    assert [layer.mlp.down_proj.in_features for layer in sliced.model.layers] == widths
    assert all(width % 8 == 0 for width in widths)
    counted = sum(parameter.numel() for parameter in sliced.parameters())
    assert plan.parameters["after"] == counted, "the plan states another size than the model has"
    assert abs(sum(widths) - 0.6 * 4 * 96) <= 8


@pytest.mark.parametrize("which", ["gate", "up", "down"])
def test_a_planted_slicing_error_is_noticed(which, monkeypatch):
    """The masked-against-sliced check must fail when the slicer takes the wrong row or column."""
    model = tiny_model("llama_bias")
    plan = cfsp.prune(model, tokens(), ratio=0.4, round_to=8)
    right = slicing.slice_ffn

    def wrong(ffn, kept):
        linear = getattr(ffn, which)
        right(ffn, kept)
        shifted = kept.roll(1)
        axis = {"columns": shifted} if which == "down" else {"rows": shifted}
        setattr(ffn.module, getattr(ffn, f"{which}_name"), slicing.slice_linear(linear, **axis))

    monkeypatch.setattr("cfsp.pruning.apply.slice_ffn", wrong)
    with pytest.raises(AssertionError):
        assert_masked_equals_sliced(model, plan, tokens(2, seed=1))
    monkeypatch.setattr("cfsp.pruning.probe.slice_ffn", wrong)
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


def test_pruning_a_pruned_model_composes():
    model, ids = tiny_model(), tokens()
    first = cfsp.prune(model, ids, ratio=0.25, round_to=8)
    smaller = cfsp.apply(copy.deepcopy(model), first)
    second = cfsp.prune(smaller, ids, ratio=0.25, round_to=8)
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
    blocks = (BlockPlan(attention=False), *plan.blocks[1:])
    with pytest.raises(UnsupportedModelError, match="removes attention"):
        cfsp.apply(tiny_model(), PruningPlan("m", "f", {}, blocks, {}, {}))


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

    from cfsp.models.checkpoint import save_checkpoint
    from cfsp.package import ROOT

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
