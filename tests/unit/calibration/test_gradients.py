"""Gradient terms against an independent whole-model autograd computation, and what the metrics make of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

import cfsp
from cfsp.architecture.views import resolve
from cfsp.calibration import gradients
from cfsp.calibration.calibration_set import CalibrationSet
from cfsp.calibration.gradients import VARIANTS, GradientTerms, gradient_terms, projections
from cfsp.calibration.statistics_cache import StatisticsCache
from cfsp.errors import ConfigError, DataError, RunError
from cfsp.importance.base import Activation
from cfsp.importance.taylor import Taylor
from cfsp.importance.weight_norm import WeightNorm
from cfsp.model.driver import BlockDriver
from cfsp.plan.pruning_plan import BlockPlan
from tests.helpers.tiny import tiny_model, tokens

IDS = tokens(5, 24)
OF = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
OF |= {name: f"self_attn.{name}_proj" for name in "qkvo"}


def calibration(ids=IDS) -> CalibrationSet:
    return CalibrationSet(ids, "random", "", 0)


def terms_of(model, ids=IDS, cache=None, **keys):
    return gradient_terms(BlockDriver(resolve(model), 4), calibration(ids), cache, **keys)


def independent(model, ids=IDS) -> list[dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """(W, g, F) of every matrix from plain backward calls: g of the mean loss, F from one sequence at a time."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    squares: dict[str, torch.Tensor] = {}
    for sequence in ids:
        model.zero_grad()
        logits = model(sequence[None]).logits
        cross_entropy(logits[0, :-1], sequence[1:]).backward()
        for name, parameter in model.named_parameters():
            squares[name] = squares.get(name, 0) + parameter.grad**2 / len(ids)
    model.zero_grad()
    cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    found = []
    for index in range(len(model.model.layers)):
        names = {short: f"model.layers.{index}.{name}.weight" for short, name in OF.items()}
        by_name = dict(model.named_parameters())
        found.append(
            {s: (by_name[n].detach().double(), by_name[n].grad.double(), squares[n].double()) for s, n in names.items()}
        )
    model.zero_grad(set_to_none=True)
    return found


def saliences(weight, gradient, fisher) -> dict[str, torch.Tensor]:
    first, second = weight * gradient, weight * fisher * weight
    return {"element1": first, "element2": second, "mix": first - 0.5 * second, "vector": first}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_terms_equal_an_independent_autograd_computation(architecture, checkpointing):
    model = tiny_model(architecture)
    found, cached = terms_of(model, checkpointing=checkpointing)
    assert not cached
    for block, expected in zip(found.blocks, independent(model), strict=True):
        assert set(block) == set(OF)
        for name, matrices in expected.items():
            axis = 0 if name in ("down", "o") else 1
            for row, variant in enumerate(VARIANTS):
                salience = saliences(*matrices)[variant]
                whole = salience.sum(axis).abs() if variant == "vector" else salience.abs().sum(axis)
                # fp32 gradients in another order of sums.
                assert (block[name][row] - whole).abs().max() <= 1e-5 * whole.abs().max(), (name, variant)


def equal(first, second) -> bool:
    pairs = zip(first.blocks, second.blocks, strict=True)
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_checkpointing_does_not_change_the_terms(architecture, tmp_path):
    model = tiny_model(architecture)
    kept, _ = terms_of(model)
    again, _ = terms_of(model, checkpointing=True)
    assert equal(kept, again)
    kept.save(tmp_path / "terms", {})
    assert equal(kept, GradientTerms.load(tmp_path / "terms"))


def test_blocks_lack_what_an_earlier_pruning_took():
    model = tiny_model()
    plan = cfsp.prune(model, tokens(), "uniform", 0.5, round_to=1)
    lacking = [{}, {"attention": False}, {"ffn": False}, {"attention": False, "ffn": False}]
    cfsp.apply(model, replace(plan, blocks=tuple(BlockPlan(**less) for less in lacking)))
    found, _ = terms_of(model)
    assert equal(found, terms_of(model, checkpointing=True)[0])
    attention, ffn = set("qkvo"), {"gate", "up", "down"}
    assert [set(block) for block in found.blocks] == [attention | ffn, ffn, attention]


def test_a_group_counts_each_of_its_weights_once():
    """Summed over a KV group, and for each neuron: rows and columns of the full matrices, by hand."""
    model = tiny_model()
    found, _ = terms_of(model)
    view, full = resolve(model), independent(model)
    zero = torch.zeros(1)
    for block, matrices in zip(view.blocks, full, strict=True):
        activation = Activation(zero, zero, zero, zero, found.blocks[block.index])
        for variant in VARIANTS:
            terms = {name: saliences(*values)[variant] for name, values in matrices.items()}

            def size(values, axis, variant=variant):
                return values.sum(axis).abs().sum() if variant == "vector" else values.abs().sum()

            neurons = Taylor(variant).score(block.channels["ffn"], activation)
            expected = [
                size(terms["gate"][i], 0) + size(terms["up"][i], 0) + size(terms["down"][:, i], 0) for i in range(96)
            ]
            assert torch.allclose(neurons, torch.stack(expected), rtol=1e-4, atol=1e-12)
            heads = Taylor(variant).score(block.channels["attention"], activation).reshape(2, -1).sum(1)
            for group in range(2):
                wide, narrow = slice(16 * group, 16 * group + 16), slice(8 * group, 8 * group + 8)
                expected_group = size(terms["q"][wide], 1) + size(terms["o"][:, wide], 0)
                expected_group += size(terms["k"][narrow], 1) + size(terms["v"][narrow], 1)
                assert float(heads[group]) == pytest.approx(float(expected_group), rel=1e-4)


@pytest.mark.parametrize("p", [1, 2])
def test_weight_norm_is_over_all_weights_of_the_group(p):
    block = resolve(tiny_model()).blocks[0]
    zero = torch.zeros(1)
    activation = Activation(zero, zero, zero, zero)
    weights = {name: linear.weight.detach().abs() ** p for name, linear in projections(block).items()}
    neurons = WeightNorm(p).score(block.channels["ffn"], activation)
    assert torch.allclose(neurons, weights["gate"].sum(1) + weights["up"].sum(1) + weights["down"].sum(0))
    heads = WeightNorm(p).score(block.channels["attention"], activation).reshape(2, -1).sum(1)
    for group in range(2):
        wide, narrow = slice(16 * group, 16 * group + 16), slice(8 * group, 8 * group + 8)
        whole = weights["q"][wide].sum() + weights["o"][:, wide].sum()
        whole += weights["k"][narrow].sum() + weights["v"][narrow].sum()
        assert float(heads[group]) == pytest.approx(float(whole), rel=1e-5)


def test_the_model_is_left_as_it_was():
    model = tiny_model()
    for parameter in model.model.layers[1].parameters():
        parameter.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad():
        terms_of(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_blocks_are_run_twice_where_the_values_for_backward_do_not_fit(monkeypatch, caplog):
    model = tiny_model(blocks=2)
    expected = terms_of(model)[0]
    caplog.set_level("INFO", logger="cfsp.calibration.gradients")
    assert not caplog.records
    monkeypatch.setattr("cfsp.calibration.gradients.available", lambda _: 10_000)
    assert equal(expected, terms_of(model)[0])
    assert "each block is run twice" in caplog.text


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_model_with_hooks_and_gradients_of_its_own_is_left_as_it_was(checkpointing):
    model = tiny_model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
        parameter.requires_grad_(False)
    model.model.layers[1].train()
    modes = [module.training for module in model.modules()]
    calls = []
    model.model.layers[2].register_forward_hook(lambda *_: calls.append(1))
    found, _ = terms_of(model, checkpointing=checkpointing)
    assert equal(found, terms_of(tiny_model())[0])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert len(model.model.layers[2]._forward_hooks) == 1
    assert not any("forward" in vars(layer) for layer in model.model.layers)
    assert len(calls) == len(IDS) * (1 + checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_full_gradients_exist_for_one_block_at_a_time(checkpointing, monkeypatch):
    model = tiny_model()
    owner = {id(p): i for i, layer in enumerate(model.model.layers) for p in layer.parameters()}
    asked, right = [], torch.autograd.grad

    def grad(outputs, inputs, *args, **keys):
        listed = inputs if isinstance(inputs, list) else [inputs]
        asked.append({owner[id(value)] for value in listed if id(value) in owner})
        return right(outputs, inputs, *args, **keys)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    terms_of(model, checkpointing=checkpointing)
    assert all(len(blocks) <= 1 for blocks in asked)
    in_order = [next(iter(blocks)) for blocks in asked if blocks]
    assert in_order == sorted(in_order, reverse=True)


def test_terms_are_cached_by_content(tmp_path, caplog, monkeypatch):
    model, cache = tiny_model(), StatisticsCache(tmp_path, "sha256:one")
    first, cached = terms_of(model, cache=cache)
    assert not cached
    again, cached = terms_of(model, cache=cache, checkpointing=True)
    assert cached
    assert torch.equal(again.blocks[1]["k"], first.blocks[1]["k"])
    for other in (
        lambda: terms_of(model, tokens(5, 24, seed=1), cache),
        lambda: terms_of(model, cache=StatisticsCache(tmp_path, "sha256:two")),
    ):
        assert not other()[1]
    monkeypatch.setattr(gradients, "GRADIENT_VERSION", 99)
    assert not terms_of(model, cache=cache)[1]
    for file in (tmp_path / "gradients").iterdir():
        file.write_bytes(b"damaged")
    assert not terms_of(model, cache=cache)[1]
    assert "cannot be read" in caplog.text


def test_weights_that_are_not_in_memory_are_refused():
    with torch.device("meta"):
        model = tiny_model_on_meta()
    with pytest.raises(ConfigError, match="gradients need every weight in memory.*importance=wanda"):
        terms_of(model)


def test_weights_that_accelerate_offloaded_are_refused():
    from accelerate import cpu_offload

    model = cpu_offload(tiny_model(), execution_device="cpu")
    with pytest.raises(ConfigError, match="gradients need every weight in memory"):
        terms_of(model)


def test_windows_of_one_token_are_refused():
    with pytest.raises(DataError, match="no next token to predict"):
        terms_of(tiny_model(), tokens(5, 1))


def tiny_model_on_meta():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(tiny_model().config)


def test_gradients_that_are_not_finite_name_the_block():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(RunError, match=r"block \d: the gradients of .* not finite; try model.dtype=float32"):
        terms_of(model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_llm_pruner_in_its_variants(variant):
    model = tiny_model(blocks=6)
    words = [f"importance.variant={variant}"]
    plan = cfsp.prune(model, tokens(), "llm_pruner", 0.4, round_to=1, overrides=words)
    checked = cfsp.prune(
        model, tokens(), "llm_pruner", 0.4, round_to=1, overrides=[*words, "importance.gradient_checkpointing=true"]
    )
    assert [b.ffn_kept for b in plan.blocks] == [b.ffn_kept for b in checked.blocks]
    assert plan.blocks[0].ffn_kept is None
    assert plan.blocks[5].ffn_kept is None
    widths = [len(b.ffn_kept) for b in plan.blocks[1:5]]
    assert max(widths) - min(widths) <= 1, "the same ratio in every pruned block"
    decoder = sum(p.numel() for p in model.model.layers.parameters())
    assert abs(plan.achieved["removed_parameters"] - 0.4 * decoder) <= 4 * 96
