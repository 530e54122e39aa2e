"""Maps and factors that stand in for removed blocks, against direct computations on hidden states."""

from __future__ import annotations

import copy

import pytest
import torch

import cfsp
from cfsp.architecture.views import resolve
from cfsp.config.budget import Budget
from cfsp.errors import ConfigError, UnsupportedModelError
from cfsp.plan.pruning_plan import BlockPlan
from cfsp.pruner.block_pruner import BlockPruner
from cfsp.pruner.depth import ShortGPT, SlidingWindow
from cfsp.pruner.gaps import find_gaps
from cfsp.pruner.removed_block_map import fold_linear_maps, fold_scales
from cfsp.pruner.residual_check import check_residual_stream
from cfsp.pruner.ridge_path import RIDGES
from tests.helpers.contexts import IDS, context_of
from tests.helpers.tiny import tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

KEPT, GONE = BlockPlan(), BlockPlan(attention=False, ffn=False)
NO_FFN, NO_ATTENTION = BlockPlan(ffn=False), BlockPlan(attention=False)
BUDGET = Budget(0.3, "decoder")


def stream(model, ids=IDS):
    """Name of a point -> hidden states [tokens, d] fp64: entering, attention and ffn written, leaving of each block."""
    seen, handles = {}, []
    for index, layer in enumerate(model.model.layers):
        modules = {"attention": layer.self_attn.o_proj, "ffn": layer.mlp.down_proj, "leaving": layer}
        for name, module in modules.items():

            def keep(_, args, out, key=(index, name)):
                seen[key] = (out[0] if isinstance(out, tuple) else out).double().flatten(0, 1)
                if key[1] == "leaving":
                    seen[key[0], "entering"] = args[0].double().flatten(0, 1)

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


def test_gaps_are_runs_in_the_order_in_which_submodules_write():
    view = resolve(tiny_model(blocks=6))
    found = find_gaps(view, [KEPT, GONE, GONE, KEPT, NO_FFN, NO_ATTENTION])
    assert [gap.writer for gap in found] == [(0, "ffn"), (4, "attention")]
    assert [gap.removed for gap in found] == [
        ((1, "attention"), (1, "ffn"), (2, "attention"), (2, "ffn")),
        ((4, "ffn"), (5, "attention")),
    ]
    assert [(gap.before, gap.behind) for gap in found] == [
        ((1, "entering"), (2, "leaving")),
        ((4, "middle"), (5, "middle")),
    ]
    assert find_gaps(view, [GONE, *[KEPT] * 5])[0].writer is None
    assert find_gaps(view, [KEPT] * 6) == []


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "llama_bias"])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_the_map_solves_the_published_least_squares(architecture, ridge):
    """With ridge 0: T = argmin ||Y - M + M T - L||, here from the rows themselves by a QR of them (lstsq)."""
    model = tiny_model(architecture, blocks=6)
    seen = stream(model)
    tensors, facts = fold_linear_maps(context_of(model, BUDGET), [KEPT, GONE, GONE, KEPT, GONE, KEPT], ridge)
    assert [fact["folded_into"] for fact in facts] == [[0, "ffn"], [3, "ffn"]]
    for writer, last in ((0, 2), (3, 4)):
        m, y, target = seen[writer, "ffn"], seen[writer, "leaving"], seen[last, "leaving"]
        pull = (ridge * m.square().mean() * len(m)).sqrt() * torch.eye(32, dtype=torch.float64)
        solution = torch.linalg.lstsq(torch.cat([m, pull]), torch.cat([target + m - y, pull]), driver="gelsd").solution
        down = model.model.layers[writer].mlp.down_proj
        expected = solution.T @ down.weight.detach().double()
        found = tensors[f"blocks.{writer}.ffn.weight"].double()
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
        if down.bias is not None:
            expected = solution.T @ down.bias.detach().double()
            assert (tensors[f"blocks.{writer}.ffn.bias"] - expected).abs().max() < 1e-4 * expected.abs().max()
    assert len(tensors) == (4 if architecture == "llama_bias" else 2)


def test_what_leaves_the_pruned_block_is_nearer_to_the_dense_state():
    model = tiny_model(blocks=6)
    context, decisions = context_of(model, BUDGET), [KEPT, GONE, GONE, GONE, KEPT, KEPT]
    plan = ShortGPT("shortgpt", compensation="linear_map", ridge=0.0).complete(context, decisions, {})
    target, before = stream(model)[3, "leaving"], stream(model)[0, "leaving"]
    after = stream(cfsp.apply(copy.deepcopy(model), plan))[0, "leaving"]
    assert (after - target).square().sum() < 0.9 * (before - target).square().sum()


def test_the_gap_before_a_lone_ffn_is_mapped_by_the_attention():
    model = tiny_model(blocks=4)
    seen = stream(model)
    tensors, facts = fold_linear_maps(context_of(model, BUDGET), [KEPT, NO_FFN, NO_ATTENTION, KEPT], 0.0)
    assert facts[0]["folded_into"] == [1, "attention"]
    m, y = seen[1, "attention"], seen[1, "entering"] + seen[1, "attention"]
    target = seen[2, "entering"] + seen[2, "attention"]
    solution = torch.linalg.lstsq(m, target + m - y, driver="gelsd").solution
    expected = solution.T @ model.model.layers[1].self_attn.o_proj.weight.detach().double()
    assert (tensors["blocks.1.attention.weight"] - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_ridge_is_the_one_with_the_lowest_error_on_held_out_sequences():
    model = tiny_model(blocks=4)
    seen = stream(model)
    _, facts = fold_linear_maps(context_of(model, BUDGET), [KEPT, GONE, KEPT, KEPT], "auto")
    m, change = seen[0, "ffn"], seen[1, "leaving"] - seen[0, "leaving"]
    held = torch.arange(len(m)) // IDS.shape[1] % 4 == 3
    fit = m[~held]
    errors = [float(change[held].square().sum())]
    for ridge in RIDGES:
        system = fit.T @ fit + ridge * fit.square().mean() * len(fit) * torch.eye(32, dtype=torch.float64)
        errors.append(
            float((m[held] @ torch.linalg.solve(system, fit.T @ change[~held]) - change[held]).square().sum())
        )
    assert facts[0]["ridge"] == [None, *RIDGES][errors.index(min(errors))]


def test_a_gap_that_begins_the_model_is_left_alone_and_said(caplog):
    tensors, facts = fold_linear_maps(context_of(tiny_model(), BUDGET), [GONE, KEPT, KEPT, KEPT], 0.0)
    assert tensors == {}
    assert facts[0]["folded_into"] is None
    assert "sparsity.protect=[1,0]" in caplog.text


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "llama_bias"])
def test_dividing_behind_the_gap_is_multiplying_before_it(architecture, tied):
    """The published form, by hooks on embedding and projections, with a tied head that stays as it is."""
    model = tiny_model(architecture, blocks=6, tie_word_embeddings=tied, rms_norm_eps=1e-12)
    seen, decisions = stream(model), [KEPT, GONE, KEPT, GONE, GONE, KEPT]
    plan = ShortGPT("shortgpt", compensation="scale").complete(context_of(model, BUDGET), decisions, {})
    factors = [entry["factor"] for entry in plan.notes["scale"]]
    for factor, (first, last) in zip(factors, ((1, 1), (3, 4)), strict=True):
        ends = seen[last, "leaving"].abs().mean(0) / seen[first, "entering"].abs().mean(0)
        assert factor == pytest.approx(float(ends.mean()), rel=1e-5)
    scaled = cfsp.apply(copy.deepcopy(model), plan)
    plain = cfsp.apply(copy.deepcopy(model), ShortGPT("shortgpt").complete(context_of(model, BUDGET), decisions, {}))
    with torch.no_grad():
        unscaled = plain(IDS).logits
    layers = plain.model.layers
    before = [(plain.model.embed_tokens, factors[0] * factors[1])]
    for layer, factor in ((layers[0], factors[0] * factors[1]), (layers[1], factors[1])):
        before += [(layer.self_attn.o_proj, factor), (layer.mlp.down_proj, factor)]
    for module, factor in before:
        module.register_forward_hook(lambda _, args, out, factor=factor: factor * out)
    with torch.no_grad():
        found, expected = scaled(IDS).logits, plain(IDS).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (found - unscaled).abs().max() > 1e-2 * expected.abs().max()


def test_nothing_is_scaled_where_nothing_is_behind_the_gap():
    tensors, facts = fold_scales(context_of(tiny_model(), BUDGET), [KEPT, KEPT, GONE, GONE])
    assert tensors == {}
    assert len(facts) == 1


@pytest.mark.parametrize("compensation", ["linear_map", "scale"])
@pytest.mark.parametrize("pruner", ["shortgpt", "sliding_window", "block_pruner"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "llama_bias"])
def test_saved_replayed_and_generated(pruner, compensation, architecture, tmp_path):
    from transformers import AutoModelForCausalLM

    from cfsp.checkpoint.save import save_checkpoint

    model = tiny_model(architecture, blocks=6, tie_word_embeddings=architecture == "qwen2")
    untouched = copy.deepcopy(model.state_dict())
    overrides = ["sparsity.protect=[1,1]"]
    compensated = [*overrides, f"pruner.compensation={compensation}"]
    plans = [cfsp.prune(model, tokens(), pruner, 0.34, scope="decoder", overrides=compensated) for _ in range(2)]
    assert plans[0] == plans[1], "not deterministic"
    assert all(torch.equal(value, untouched[name]) for name, value in model.state_dict().items())
    plain = cfsp.prune(model, tokens(), pruner, 0.34, scope="decoder", overrides=overrides)
    plan = plans[0]
    assert plan.blocks == plain.blocks
    assert plan.achieved == plain.achieved
    assert plan.tensors
    pruned = cfsp.apply(copy.deepcopy(model), plan)
    assert plan.parameters["after"] == sum(parameter.numel() for parameter in pruned.parameters())
    again = cfsp.apply(copy.deepcopy(model), cfsp.PruningPlan.load(plan.save(tmp_path / "plan.json")))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in pruned.state_dict().items())
    save_checkpoint(pruned, tmp_path / "model", files=plan.files())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
    ids = tokens(2, seed=1)
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, pruned(ids).logits)
        cached, full = (pruned.generate(ids, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, full)
    if pruner != "block_pruner":
        assert pruned.config.model_type == model.config.model_type, "the folder is a plain one"


def test_pruning_a_compensated_model_again_composes():
    model, ids = tiny_model(blocks=6), tokens()
    overrides = ["pruner.compensation=scale"]
    first = cfsp.prune(model, ids, "shortgpt", 0.2, overrides=overrides)
    smaller = cfsp.apply(copy.deepcopy(model), first)
    second = cfsp.prune(smaller, ids, "block_pruner", 0.2, overrides=["pruner.compensation=linear_map"])
    twice = cfsp.apply(smaller, second).state_dict()
    at_once = cfsp.apply(copy.deepcopy(model), second.compose(first)).state_dict()
    assert all(torch.equal(twice[name], at_once[name]) for name in twice)


@pytest.mark.parametrize("compensation", ["linear_map", "scale"])
@pytest.mark.parametrize("architecture", ["gemma2", "olmo2", "granite"])
def test_blocks_that_change_what_is_written_are_refused(architecture, compensation):
    settings = {"residual_multiplier": 0.3} if architecture == "granite" else {}
    model = tiny_model(architecture, **settings)
    with pytest.raises(UnsupportedModelError, match=rf"pruner\.compensation={compensation} needs blocks that add"):
        cfsp.prune(model, tokens(), "shortgpt", 0.3, overrides=[f"pruner.compensation={compensation}"])


@pytest.mark.parametrize("place", ["block", "head"])
def test_a_reader_without_a_norm_is_refused_for_scale_alone(place):
    model = tiny_model()
    if place == "head":
        model.model.norm = torch.nn.Identity()
    else:
        model.model.layers[0].input_layernorm = torch.nn.Identity()
    check_residual_stream(resolve(model), "linear_map")
    with pytest.raises(UnsupportedModelError, match="needs a norm before everything"):
        check_residual_stream(resolve(model), "scale")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "phi", "gpt_neox", "opt"])
def test_families_with_plain_residuals_are_taken(architecture, dtype):
    from transformers import AutoConfig, AutoModelForCausalLM

    if architecture == "opt":
        config = AutoConfig.for_model(
            "opt", hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=128,
            word_embed_proj_dim=32, max_position_embeddings=64,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config).eval()
    elif architecture in ("phi", "gpt_neox"):
        model = tiny_model(architecture, num_key_value_heads=4, blocks=3)
    else:
        model = tiny_model(architecture)
    for compensation in ("linear_map", "scale"):
        check_residual_stream(resolve(model.to(dtype)), compensation)


def test_mixtures_are_refused():
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(
        MixtralConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=128, num_local_experts=4, num_experts_per_tok=2,
        )
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"pruner\.compensation=scale is folded .* mixture of experts"):
        cfsp.prune(model, tokens(), "shortgpt", 0.3, overrides=["pruner.compensation=scale"])


def test_wrong_settings_are_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"pruner\.ridge"):
        cfsp.prune(tiny_model(), tokens(), "shortgpt", 0.3, overrides=["pruner.ridge=-1"])
    for pruner in (ShortGPT, SlidingWindow, BlockPruner):
        with pytest.raises(ValueError, match="use pruner.compensation=none or linear_map or scale"):
            pruner("x", compensation="bias")
        assert pruner.unused_settings({"compensation": "none"}) == {"ridge"}
        assert pruner.unused_settings({"compensation": "linear_map"}) == set()
