"""Depth pruning in one shot: single blocks by influence (ShortGPT), or consecutive blocks (sliding window)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from cfsp.config.budget import Budget
from cfsp.config.components import component
from cfsp.config.contracts import Allocator, Unit
from cfsp.errors import BudgetError
from cfsp.plan.pruning_plan import BlockPlan
from cfsp.pruner.removal_compensation import CompensatesRemoval
from cfsp.pruner.units import block_sizes, blocks_with_attention
from cfsp.sparsity.budget import Sizes, check_scope

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.views import DecoderView
    from cfsp.plan.pruning_plan import PruningPlan
    from cfsp.pruner.base import PlanContext

_GONE = BlockPlan(attention=False, ffn=False)


class DepthPruner(CompensatesRemoval):
    """Base of the pruners that remove whole blocks."""

    prunes: ClassVar[bool] = True
    plans_with = ()
    removes = "removes whole blocks"

    def check(self, view: DecoderView, budget: Budget) -> None:
        """See :class:`cfsp.config.contracts.Pruner`."""
        check_scope(budget, f"pruner={self.name}", "a pruner of FFN neurons (cfsp, flap)")
        check_blocks(view, budget)

    def removed_units(self) -> tuple[Unit, ...]:
        return ("blocks",)

    def units(self, view: DecoderView, budget: Budget) -> dict[str, int]:
        """See :class:`cfsp.config.contracts.Pruner`."""
        return {"blocks": len(budget.free_blocks(len(view.blocks)))}

    def biased_projections(self) -> tuple[str, ...]:
        return ()

    def keeps_blocks_equal(self, view: DecoderView, budget: Budget, allocator: Allocator) -> bool:
        """Return True: whole blocks are removed, and the others do not change."""
        return True


@component
class ShortGPT(DepthPruner):
    """Remove the blocks of least influence in one shot (arXiv 2403.03853): influence = 1 - cos(entering, leaving).

    The number of removed blocks is the one that comes nearest to the budget.

    Attributes:
        name: name of the method.
        tokens: whether the influence is the mean over all tokens, or over the last tokens of the sequences.
        compensation: none, linear_map or scale (:mod:`cfsp.pruner.removed_block_map`).
        ridge: strength that holds the map of linear_map at the identity; auto: chosen by held-out sequences.
    """

    name: str
    tokens: Literal["mean", "last"] = "mean"
    compensation: str = "none"
    ridge: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"] = "auto"

    def most_removable(self, view: DecoderView, budget: Budget) -> int:
        """See :class:`cfsp.config.contracts.Pruner`. One block with attention stays."""
        free, sizes, attention = budget.free_blocks(len(view.blocks)), block_sizes(view), blocks_with_attention(view)
        staying = 0 if attention - set(free) else min(sizes[index] for index in attention)
        return sum(sizes[index] for index in free) - staying

    def plan(self, context: PlanContext) -> PruningPlan:
        """See :class:`cfsp.config.contracts.Pruner`."""
        view, budget = context.driver.view, context.budget
        influence = self._influence(context)
        order = sorted(budget.free_blocks(len(view.blocks)), key=lambda block: influence[block])
        order = _with_attention_left(view, order)
        removed = set(order[: _nearest([_size(view, block) for block in order], _target(view, budget))])
        blocks = [_GONE if block.index in removed else BlockPlan() for block in view.blocks]
        return self.complete(context, blocks, notes={"influence": influence, "removed_blocks": sorted(removed)})

    def _influence(self, context: PlanContext) -> list[float]:
        # Start-up time: loads torch.
        from cfsp.calibration.similarity import block_similarity

        if self.tokens == "mean":
            return context.statistics.distance("cosine").tolist()
        similarity, _ = block_similarity(context.driver, context.calibration, context.cache)
        return (1 - similarity.last.diagonal(1)).tolist()


@component
class SlidingWindow(DepthPruner):
    """Remove n consecutive blocks whose entering and leaving hidden states are most similar (arXiv 2403.17887).

    n is the number of blocks that comes nearest to the budget.

    Attributes:
        name: name of the method.
        tokens: whether the similarity is over the last tokens of the sequences (as published), or over all tokens.
        compensation: none, linear_map or scale (:mod:`cfsp.pruner.removed_block_map`).
        ridge: strength that holds the map of linear_map at the identity; auto: chosen by held-out sequences.
    """

    name: str
    tokens: Literal["mean", "last"] = "last"
    compensation: str = "none"
    ridge: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"] = "auto"

    def check(self, view: DecoderView, budget: Budget) -> None:
        """See :class:`cfsp.config.contracts.Pruner`."""
        super().check(view, budget)
        check_window(view, budget)

    def most_removable(self, view: DecoderView, budget: Budget) -> int:
        """See :class:`cfsp.config.contracts.Pruner`. One block with attention stays."""
        free, sizes, attention = budget.free_blocks(len(view.blocks)), block_sizes(view), blocks_with_attention(view)
        runs = (free[first:end] for first in range(len(free)) for end in range(first + 1, len(free) + 1))
        unbroken = (run for run in runs if run[-1] - run[0] == len(run) - 1)
        return max((sum(sizes[run[0] : run[-1] + 1]) for run in unbroken if attention - set(run)), default=0)

    def plan(self, context: PlanContext) -> PruningPlan:
        """See :class:`cfsp.config.contracts.Pruner`."""
        # Start-up time: loads torch.
        from cfsp.calibration.similarity import block_similarity

        view, budget = context.driver.view, context.budget
        similarities, _ = block_similarity(context.driver, context.calibration, context.cache)
        similarity = similarities.last if self.tokens == "last" else similarities.mean
        first, n = _best_window(view, budget, similarity)
        blocks = [_GONE if first <= block.index < first + n else BlockPlan() for block in view.blocks]
        notes = {
            "removed_blocks": list(range(first, first + n)),
            "similarity": {str(start): float(similarity[start, start + n]) for start in _starts(view, budget, n)},
        }
        return self.complete(context, blocks, notes=notes)


def check_blocks(view: DecoderView, budget: Budget) -> None:
    """Refuse a budget that cannot be met by removing whole blocks.

    Raises:
        BudgetError: names the ratio that can be met.
    """
    free = _with_attention_left(view, budget.free_blocks(len(view.blocks)))
    sizes, target = [_size(view, block) for block in free], _target(view, budget)
    wish = f"sparsity.ratio={budget.ratio} of sparsity.scope={budget.scope}"
    scope = Sizes.of(view).scope_parameters(budget.scope)
    if sizes and target < min(sizes) / 2:
        raise BudgetError(
            f"{wish}: whole blocks are removed, and one is {min(sizes) / scope:.4f} of it; use "
            f"sparsity.ratio={min(sizes) / scope:.4f}, or a pruner that removes less at a time"
        )
    if target > sum(sizes) + max(sizes, default=0) / 2:
        raise BudgetError(
            f"{wish} cannot be met: the {len(sizes)} blocks that may go (sparsity.protect={budget.shown_protect()}) "
            f"are {sum(sizes) / scope:.4f} of it; use a smaller ratio"
        )


def _with_attention_left(view: DecoderView, order: Sequence[int]) -> list[int]:
    """Drop blocks from the end of ``order`` until one block with attention remains in the model."""
    staying = [b.index for b in view.blocks if b.index not in set(order) and not b.attention_removed]
    if staying:
        return list(order)
    last = [block for block in order if not view.blocks[block].attention_removed][-1]
    return [block for block in order if block != last]


def _best_window(view: DecoderView, budget: Budget, similarity: Tensor) -> tuple[int, int]:
    """Find the consecutive blocks with the most similar ends, among all runs of the right length.

    Where blocks differ in size, a run that misses the budget by more than half of the largest block does not count.

    Returns:
        The first block, and the number of blocks.
    """
    target, unit = _target(view, budget), max(_size(view, block.index) for block in view.blocks)
    missed = {run: abs(_run_size(view, run) - target) for run in _runs(view, budget)}
    n = len(min(missed, key=lambda run: missed[run]))
    fitting = [run.start for run, by in missed.items() if len(run) == n and by <= unit / 2]
    return max(fitting, key=lambda start: float(similarity[start, start + n])), n


def check_window(view: DecoderView, budget: Budget) -> None:
    """Refuse a budget that needs more consecutive blocks than can be removed.

    Raises:
        BudgetError: the message names the largest run of blocks.
    """
    blocks = [_size(view, block.index) for block in view.blocks]  # Computed once, because there are thousands of runs.
    sizes = [sum(blocks[run.start : run.stop]) for run in _runs(view, budget)]
    unit = max(blocks)
    if _target(view, budget) > max(sizes) + unit / 2:
        scope = Sizes.of(view).scope_parameters(budget.scope)
        raise BudgetError(
            f"sparsity.ratio={budget.ratio} of sparsity.scope={budget.scope} cannot be met: the largest run of blocks "
            f"that leaves one with attention is {max(sizes) / scope:.4f} of it; use a smaller ratio, or pruner=shortgpt"
        )


def _runs(view: DecoderView, budget: Budget) -> list[range]:
    lengths = range(1, len(view.blocks))
    return [range(start, start + n) for n in lengths for start in _starts(view, budget, n)]


def _run_size(view: DecoderView, run: range) -> int:
    return sum(_size(view, block) for block in run)


def _starts(view: DecoderView, budget: Budget, n: int) -> list[int]:
    """Return the start of each run of ``n`` unprotected blocks whose removal leaves a block with attention."""
    free = set(budget.free_blocks(len(view.blocks)))
    runs = [range(start, start + n) for start in range(len(view.blocks) - n + 1)]
    attention = {block.index for block in view.blocks if not block.attention_removed}
    return [run.start for run in runs if set(run) <= free and attention - set(run)]


def _size(view: DecoderView, block: int) -> int:
    return sum(parameter.numel() for parameter in view.blocks[block].module.parameters())


def _target(view: DecoderView, budget: Budget) -> float:
    """Return the number of parameters to remove."""
    return budget.ratio * Sizes.of(view).scope_parameters(budget.scope)


def _nearest(sizes: Sequence[int], target: float) -> int:
    """Return how many sizes from the front come nearest to ``target``; at least one."""
    totals = list(accumulate(sizes))
    return 1 + min(range(len(totals)), key=lambda n: abs(totals[n] - target))
