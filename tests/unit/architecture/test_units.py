"""The units that a block can lose: their numbers, and the parameters that go when one of them is cut off."""

from __future__ import annotations

import pytest

from cfsp.architecture.units import Units
from cfsp.architecture.views import BlockView, resolve
from cfsp.plan.pruning_plan import BlockPlan
from cfsp.plan.slice_block import slice_block
from cfsp.sparsity.budget import Sizes
from tests.helpers.architectures import ARCHITECTURES
from tests.helpers.tiny import tiny_model

MIXTURES = [name for name, entry in ARCHITECTURES.items() if entry.experts is not None]


def size(block: BlockView) -> int:
    return sum(parameter.numel() for parameter in block.module.parameters())


def all_but_last(n: int) -> tuple[int, ...]:
    return tuple(range(n - 1))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_parameters_of_a_unit_are_those_that_go_with_it(name) -> None:
    model = tiny_model(name)
    for kind in ("neurons", "kv_groups"):
        block = resolve(model).blocks[0]
        units, before = block.units(kind), size(block)
        kept = all_but_last(units.n)
        decision = BlockPlan(ffn_kept=kept) if kind == "neurons" else BlockPlan(kv_groups_kept=kept)
        slice_block(block, decision, {})
        assert units.n > 1
        assert before - size(block) == units.parameters > 0
        assert resolve(model).blocks[0].units(kind).n == units.n - 1


@pytest.mark.parametrize("name", MIXTURES)
def test_units_of_a_mixture(name) -> None:
    block = resolve(ARCHITECTURES[name].build()).mixtures[0]
    neurons, experts = block.units("neurons"), block.units("experts")
    before = size(block)
    kept = tuple(all_but_last(neurons.n) for _ in range(experts.n))
    slice_block(block, BlockPlan(expert_neurons_kept=kept), {})
    assert before - size(block) == neurons.parameters, "a neuron of every expert"
    assert neurons.total <= experts.total, "an expert takes its row of the router and its output bias along"
    assert experts.least >= 2 * experts.step > 0


def test_a_block_without_the_kind_has_no_units() -> None:
    view = resolve(tiny_model())
    assert view.units("experts") == [Units()] * len(view.blocks)
    assert BlockView(0, view.blocks[0].module, None, None).units("neurons") == Units()
    assert BlockView(0, view.blocks[0].module, None, None).units("kv_groups") == Units()


def test_a_budget_counts_the_units_of_the_view() -> None:
    view = resolve(tiny_model())
    sizes = Sizes.of(view, "heads_ffn")
    assert sizes.removable == sum(units.total for kind in ("neurons", "kv_groups") for units in view.units(kind))
