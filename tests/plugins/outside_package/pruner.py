"""Three pruners: one states everything, one only the required members, and one lacks a required member."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass as pydantic_dataclass

from cfsp.components import Pruner, component
from cfsp.errors import BudgetError
from cfsp.plan.pruning_plan import BlockPlan
from cfsp.pruner.build_plan import complete
from cfsp.pruner.compensation import bias_compensation
from cfsp.pruner.units import count_neurons, free_blocks


def keep_every_nth(context, n: int) -> list[BlockPlan]:
    """Keep neurons 0, n, 2 n, ... of every block."""
    return [BlockPlan(ffn_kept=tuple(range(0, block.ffn.width, n))) for block in context.driver.view.blocks]


@component
class EveryOther(Pruner):
    """Remove every second FFN neuron, whatever the ratio; ``comment`` decides nothing."""

    name: str = "every_other"
    bias: bool = False
    comment: str = ""

    prunes: ClassVar[bool] = True
    plans_with = ()
    structure = "ffn"

    def check(self, view, budget):
        if budget.ratio > 0.5:
            raise BudgetError(f"sparsity.ratio={budget.ratio}: every second neuron is half of them; use 0.5 or less")

    def removed_units(self):
        return ("neurons",)

    def units(self, view, budget):
        return {"neurons": count_neurons(view, budget)}

    def most_removable(self, view, budget):
        return sum(block.ffn.width // 2 * block.ffn.neuron_parameters for block in free_blocks(view, budget))

    def biased_projections(self):
        return ("mlp.down_proj",) if self.bias else ()

    def keeps_blocks_equal(self, view, budget, allocator):
        return True

    @staticmethod
    def unused_settings(settings):
        return frozenset({"comment"})

    def plan(self, context):
        blocks = keep_every_nth(context, 2)
        tensors = {}
        if self.bias:
            for block, plan, found in zip(context.driver.view.blocks, blocks, context.statistics.blocks, strict=True):
                tensors |= bias_compensation(block, plan, found)
        return complete(context, blocks, tensors=tensors)


@pydantic_dataclass(frozen=True)
class Silent:
    """Knows nothing of cfsp's contract but the members that it requires."""

    name: str = "silent"
    prunes: ClassVar[bool] = True

    def check(self, view, budget):
        if budget.ratio > 0.75:
            raise BudgetError("too much")

    def plan(self, context):
        return complete(context, keep_every_nth(context, 2))


@component
class WithoutPlan(Pruner):
    """Lacks a required member."""

    name: str = "without_plan"
    prunes: ClassVar[bool] = True

    def check(self, view, budget):
        """Refuse nothing."""
