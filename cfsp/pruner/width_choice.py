"""Choosing the widths of the one-shot engine: an allocation rounded to the budget, or a search.

Only the blocks that the budget leaves free take part; protected blocks keep everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cfsp.config.budget import Budget
from cfsp.config.contracts import Allocator, SearchingAllocator
from cfsp.errors import ConfigError
from cfsp.plan.pruning_plan import BlockPlan
from cfsp.pruner.choice import best_neurons
from cfsp.sparsity.budget import Sizes, Widths, keep_fraction, legal_widths, to_widths

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.allocator.base import Allocation
    from cfsp.architecture.views import BlockView
    from cfsp.importance.base import Scores
    from cfsp.pruner.base import PlanContext

#: Function that compensates one block for the units that a decision removes: tensor name -> tensor.
Compensate = Callable[["BlockView", BlockPlan], dict[str, "Tensor"]]


@dataclass(frozen=True)
class ChosenWidths:
    """Widths that meet the budget.

    Attributes:
        widths: kept neurons (or whole experts) and KV groups of every block of the model.
        keep_ratios: share of each block that the allocator asked for, before rounding.
        notes: facts for the plan on the steps of a search.
    """

    widths: Widths
    keep_ratios: list[float]
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _FreePart:
    """Unprotected blocks, their sizes, and the budget that they have to meet."""

    blocks: list[int]
    sizes: Sizes
    budget: Budget


def choose_widths(
    context: PlanContext, scores: Scores, sizes: Sizes, budget: Budget, compensate: Compensate
) -> ChosenWidths:
    """Allocate the budget, round it to legal widths, and improve them by search where the allocator searches.

    Args:
        scores: scores of the units of every block.
        sizes: removable units of every block.
        budget: budget of these units.
        compensate: compensation of one block, for the losses of a search.

    Raises:
        BudgetError: the budget cannot be met.
    """
    free = budget.free_blocks(len(sizes.widths))
    part = _FreePart(free, sizes.only(free), budget)
    keep = keep_fraction(budget, part.sizes)
    search = _search_of(context.allocator)
    allocators = [context.allocator] if search is None else search.allocators()
    allocations = [allocator.allocate(scores.only(free), part.sizes, keep) for allocator in allocators]
    starts = _starting_widths(allocations, part)
    neurons, shares, notes = starts[0].per_block, allocations[0].keep.tolist(), dict[str, Any]()
    if search is not None:
        neurons, history = _search_widths(context, search, scores, part, starts, compensate)
        shares = [width / n if n else 1.0 for width, n in zip(neurons, part.sizes.widths, strict=True)]
        notes = {"searched_blocks": free, "search": history}
    widths, kv_groups, keep_ratios = list(sizes.widths), list(sizes.kv_groups), [1.0] * len(sizes.widths)
    for position, block in enumerate(free):
        widths[block], kv_groups[block] = neurons[position], starts[0].kv_groups[position]
        keep_ratios[block] = float(shares[position])
    return ChosenWidths(Widths(tuple(widths), tuple(kv_groups)), keep_ratios, notes)


def _search_of(allocator: Allocator) -> SearchingAllocator | None:
    """Return an allocator that searches; None where it is a closed form.

    Raises:
        ConfigError: it says that it needs the model, and lacks members of a search.
    """
    if not allocator.needs_model:
        return None
    if not isinstance(allocator, SearchingAllocator):
        needed = ("n_samples", "allocators", "search")
        missing = ", ".join(name for name in needed if not hasattr(allocator, name))
        raise ConfigError(
            f"allocator._target_={type(allocator).__qualname__}: needs_model is true, and it lacks {missing}; see "
            "SearchingAllocator in cfsp.components, or set needs_model to false"
        )
    return allocator


def _starting_widths(allocations: Sequence[Allocation], part: _FreePart) -> list[Widths]:
    """Round every allocation to legal widths; all use the KV groups of the first one.

    An allocation that cannot meet the budget with these KV groups is left out.
    """
    first = _round(allocations[0], part)
    further = [_round_beside(first.kv_groups, allocation, part) for allocation in allocations[1:]]
    return [first, *(widths for widths in further if widths.kv_groups == first.kv_groups)]


def _round(allocation: Allocation, part: _FreePart) -> Widths:
    groups = allocation.keep if allocation.keep_groups is None else allocation.keep_groups
    return to_widths(
        [share * n for share, n in zip(allocation.keep.tolist(), part.sizes.widths, strict=True)],
        part.budget,
        part.sizes,
        groups=[share * n for share, n in zip(groups.tolist(), part.sizes.kv_groups, strict=True)],
        counted=allocation.counted,
    )


def _round_beside(kv_groups: tuple[int, ...], allocation: Allocation, part: _FreePart) -> Widths:
    """Round the neurons of an allocation to legal widths beside fixed KV groups.

    Exact rounding moves neurons between blocks until they make up for what the allocation's own groups had weighed.
    """
    share = [kept / n if n else 1.0 for kept, n in zip(kv_groups, part.sizes.kv_groups, strict=True)]
    return _round(replace(allocation, keep_groups=allocation.keep.new_tensor(share)), part)


def _search_widths(
    context: PlanContext,
    search: SearchingAllocator,
    scores: Scores,
    part: _FreePart,
    starts: Sequence[Widths],
    compensate: Compensate,
) -> tuple[tuple[int, ...], list[dict[str, Any]]]:
    """Search for the FFN widths of the free blocks with the lowest loss.

    Returns:
        The widths of the free blocks, and the steps of the search.
    """
    # Start-up time: loads torch.
    from cfsp.model.snapshot import restored
    from cfsp.pruner.width_search import WidthLosses

    view = context.driver.view
    base_widths = view.widths

    def cut(block: BlockView, width: int) -> tuple[BlockPlan, dict[str, Tensor]]:
        decision = best_neurons(block, scores.units(block.index), width)
        return decision, compensate(block, decision)

    with restored(view.model):
        windows = context.calibration.input_ids[: search.n_samples]
        losses = WidthLosses(context, windows, cut, _loss_key(context))

        def loss(free_widths: tuple[int, ...]) -> float:
            widths = list(base_widths)
            for block, width in zip(part.blocks, free_widths, strict=True):
                widths[block] = width
            return losses(tuple(widths))

        legal = legal_widths(part.budget, part.sizes)
        return search.search([start.per_block for start in starts], legal, part.sizes.neuron_parameters, loss)


def _loss_key(context: PlanContext) -> dict[str, Any]:
    """Return the key of the kept losses: everything beside widths and windows that they depend on."""
    stride = None if context.gram_request is None else context.gram_request.stride
    return {**context.method, "allocator": None, "set": context.calibration.fingerprint, "stride": stride}
