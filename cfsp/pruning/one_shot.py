"""The one-shot engine: metric x allocator x structure x compensation.

CFSP, FLAP, Wanda-SP, LLM-Pruner, magnitude, uniform and random are settings of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from cfsp.allocate.budget import Sizes, Structure, Widths, check_scope, keep_fraction, to_widths
from cfsp.components import component
from cfsp.errors import UnsupportedModelError
from cfsp.importance.base import Scores, score, score_block
from cfsp.pruning.plan import BlockPlan

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.allocate.budget import Budget
    from cfsp.calibrate.statistics import BlockStatistics
    from cfsp.models.views import BlockView, DecoderView
    from cfsp.pruning.base import PlanContext
    from cfsp.pruning.plan import PruningPlan


@component
class OneShotPruner:
    """Score, allocate, round, keep the best units of each block.

    structure: what may go: FFN neurons (ffn), whole KV groups of attention heads (heads), or both (heads_ffn).
    compensation: bias adds what the removed units gave on average to the biases of down_proj and o_proj.
    sequential: the units of a block are chosen (and compensated) on what the pruned blocks before it give, as FLAP's
    repository does for Wanda-SP; how much each block keeps still comes from the dense pass.
    """

    name: str
    structure: Structure = "ffn"
    compensation: Literal["none", "bias"] = "none"
    sequential: bool = False

    prunes: ClassVar[bool] = True

    @property
    def needs_model(self) -> bool:
        return self.sequential

    def check(self, view: DecoderView, budget: Budget) -> None:
        """See :class:`cfsp.pruning.base.Pruner`."""
        if self.structure != "ffn":
            check_scope(budget, f"pruner.structure={self.structure}", "pruner.structure=ffn")
        lacking = [b.index for b in view.blocks if b.attention is None and not b.attention_removed]
        if self.structure != "ffn" and lacking:
            raise UnsupportedModelError(
                f"{type(view.model).__name__}: pruner.structure={self.structure} needs attention with separate q_proj, "
                f"k_proj, v_proj and o_proj of whole heads; block {lacking[0]} has another; use pruner.structure=ffn"
            )
        budget = self._with_biases(view, budget)
        keep_fraction(budget, Sizes.of(view, self.structure).only(budget.free_blocks(len(view.blocks))))

    def plan(self, context: PlanContext) -> PruningPlan:
        """See :class:`cfsp.pruning.base.Pruner`."""
        from cfsp.models.streamed import resident
        from cfsp.pruning.complete import complete

        view, importance = context.driver.view, context.importance
        scores = score(view, context.statistics, importance, self.structure, context.gradients, context.scored)
        widths, keep_ratios = self._allocate(context, scores)
        if self.sequential:
            decisions, tensors = self._one_after_another(context, widths)
        else:
            decisions, tensors = [], {}
            for block, found in zip(view.blocks, context.statistics.blocks, strict=True):
                neurons, groups = scores.neurons[block.index], scores.kv_groups[block.index]
                decisions.append(_best(block, neurons, groups, widths))
                if self.compensation != "none":
                    with resident(view, block):
                        tensors |= self._compensate(block, decisions[-1], found)
        return complete(context, decisions, keep_ratios=keep_ratios, tensors=tensors)

    def _allocate(self, context: PlanContext, scores: Scores) -> tuple[Widths, list[float]]:
        """Kept units per block, and the kept share that the allocator asked for; protected blocks keep all."""
        view = context.driver.view
        budget = self._with_biases(view, context.budget)
        sizes = Sizes.of(view, self.structure)
        free = budget.free_blocks(len(view.blocks))
        part = sizes.only(free)
        allocation = context.allocator.allocate(scores.only(free), part, keep_fraction(budget, part))
        keep_groups = allocation.keep if allocation.keep_groups is None else allocation.keep_groups
        chosen = to_widths(
            [share * n for share, n in zip(allocation.keep.tolist(), part.widths, strict=True)],
            budget,
            part,
            groups=[share * n for share, n in zip(keep_groups.tolist(), part.kv_groups, strict=True)],
            counted=allocation.counted,
        )
        neurons, groups, shares = list(sizes.widths), list(sizes.kv_groups), [1.0] * len(view.blocks)
        for at, block in enumerate(free):
            neurons[block], groups[block] = chosen.per_block[at], chosen.kv_groups[at]
            shares[block] = float(allocation.keep[at])
        return Widths(tuple(neurons), tuple(groups)), shares

    def _with_biases(self, view: DecoderView, budget: Budget) -> Budget:
        """The budget of the units alone: what the added biases cost (d each) goes in units too.

        Every block is reckoned to get them; one that loses nothing of a kind will not. Not in the FFN's scope, which
        counts what goes with the neurons.
        """
        if self.compensation == "none" or budget.scope == "ffn":
            return budget
        kinds = {"ffn": ("ffn",), "heads": ("attention",), "heads_ffn": ("ffn", "attention")}[self.structure]
        channels = [view.blocks[block].channels for block in budget.free_blocks(len(view.blocks))]
        outputs = [found[kind].output for found in channels for kind in kinds if kind in found]
        added = sum(output.out_features for output in outputs if output.bias is None)
        return replace(budget, ratio=budget.ratio + added / Sizes.of(view).of_scope(budget.scope))

    def _one_after_another(self, context: PlanContext, widths: Widths) -> tuple[list[BlockPlan], dict[str, Tensor]]:
        """Choose in each block on the outputs of the pruned blocks before it; the model is put back at the end."""
        from cfsp.calibrate.collectors import collecting
        from cfsp.models.snapshot import restored
        from cfsp.pruning.apply import slice_block

        driver, ids = context.driver, context.calibration.input_ids
        decisions: list[BlockPlan] = []
        tensors: dict[str, Tensor] = {}
        with restored(driver.view.model):
            for step in driver.steps(ids, "prune in sequence"):
                block = step.block
                with collecting([block]) as sums:
                    step.run()
                found = sums[0].report(*ids.shape)
                terms = None if context.gradients is None else context.gradients.blocks[block.index]
                neurons, groups = score_block(block, found, context.importance, self.structure, terms)
                decision = _best(block, neurons, groups, widths)
                replaced = self._compensate(block, decision, found)
                decisions.append(decision)
                tensors |= replaced
                if decision != BlockPlan():
                    slice_block(block, decision, replaced)
                    step.run()
        return decisions, tensors

    def _compensate(self, block: BlockView, decision: BlockPlan, found: BlockStatistics) -> dict[str, Tensor]:
        from cfsp.pruning.compensation import bias_compensation

        return bias_compensation(block, decision, found) if self.compensation == "bias" else {}


def _best(block: BlockView, neurons: Tensor, groups: Tensor, widths: Widths) -> BlockPlan:
    """The highest scores of a block; a KV group counts with the sum of its channels' scores."""
    return BlockPlan(_top(neurons, widths.per_block[block.index]), _top(groups.sum(1), widths.kv_groups[block.index]))


def _top(scores: Tensor, n: int) -> tuple[int, ...] | None:
    if n == len(scores):
        return None
    # A stable sort: equal scores keep the lower index, on every machine.
    return tuple(scores.argsort(descending=True, stable=True)[:n].sort().values.tolist())
