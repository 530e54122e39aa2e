"""Choosing the widths of the one-shot engine: an allocation rounded to the budget, or a search.

Only the blocks that the budget leaves free take part; protected blocks keep everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cfsp.allocator.search_space import SearchSpace
from cfsp.config.budget import Budget
from cfsp.config.contracts import Allocator, SearchingAllocator
from cfsp.errors import ConfigError
from cfsp.plan.pruning_plan import BlockPlan
from cfsp.pruner.choice import best_kv_groups, best_neurons
from cfsp.sparsity.budget import Sizes, SubmoduleKind, Widths, keep_fraction, legal_widths, to_widths

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.allocator.base import Allocation
    from cfsp.architecture.views import BlockView
    from cfsp.importance.base import Scores
    from cfsp.pruner.base import PlanContext

#: Function that compensates one block of a candidate: block, decision on it, decision with which the search starts ->
#: tensor name -> tensor.
CompensateCandidate = Callable[["BlockView", BlockPlan, BlockPlan], dict[str, "Tensor"]]


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
    context: PlanContext, scores: Scores, sizes: Sizes, budget: Budget, compensate: CompensateCandidate
) -> ChosenWidths:
    """Allocate the budget, round it to legal widths, and improve them by search where the allocator searches.

    Args:
        scores: scores of the units of every block.
        sizes: removable units of every block.
        budget: budget of these units.
        compensate: compensation of one block, for the candidates of a search.

    Raises:
        BudgetError: the budget cannot be met.
    """
    free = budget.free_blocks(len(sizes.widths))
    part = _FreePart(free, sizes.only(free), budget)
    keep = keep_fraction(budget, part.sizes)
    search = _search_of(context.allocator)
    allocators = [context.allocator] if search is None else search.allocators()
    allocations = [allocator.allocate(scores.only(free), part.sizes, keep) for allocator in allocators]
    if search is None:
        chosen, shares, notes = _round(allocations[0], part), allocations[0].keep.tolist(), dict[str, Any]()
    else:
        starts = _starting_widths(allocations, part, search.searched_kinds)
        chosen, history = _search_widths(context, search, scores, part, starts, compensate)
        shares = [width / n if n else 1.0 for width, n in zip(chosen.per_block, part.sizes.widths, strict=True)]
        notes = {"searched_blocks": free, "search": history}
    widths, kv_groups, keep_ratios = list(sizes.widths), list(sizes.kv_groups), [1.0] * len(sizes.widths)
    for position, block in enumerate(free):
        widths[block], kv_groups[block] = chosen.per_block[position], chosen.kv_groups[position]
        keep_ratios[block] = float(shares[position])
    return ChosenWidths(Widths(tuple(widths), tuple(kv_groups)), keep_ratios, notes)


def _search_of(allocator: Allocator) -> SearchingAllocator | None:
    """Return an allocator that searches; None where it is a closed form.

    Raises:
        ConfigError: it says that it needs the model, and has no search.
    """
    if not allocator.needs_model:
        return None
    if not isinstance(allocator, SearchingAllocator):
        raise ConfigError(
            f"allocator._target_={type(allocator).__qualname__}: needs_model is true, and it is no SearchingAllocator; "
            "derive the class from cfsp.components.SearchingAllocator, or set needs_model to false"
        )
    return allocator


def _starting_widths(
    allocations: Sequence[Allocation], part: _FreePart, searched_kinds: Sequence[SubmoduleKind]
) -> list[Widths]:
    """Round every allocation to legal widths.

    Where a search does not move KV groups, all starts use those of the first one, and an allocation that cannot meet
    the budget with them is left out.
    """
    first = _round(allocations[0], part)
    if "attention" in searched_kinds:
        return [first, *(_round(allocation, part) for allocation in allocations[1:])]
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
    compensate: CompensateCandidate,
) -> tuple[Widths, list[dict[str, Any]]]:
    """Search for the numbers of units of the free blocks with the lowest fitness.

    Returns:
        The kept units of the free blocks, and the steps of the search.
    """
    # Start-up time: loads torch.
    from cfsp.model.snapshot import restored
    from cfsp.pruner.candidate_fitness import CandidateFitness

    view = context.driver.view

    def decide(block: BlockView, kind: SubmoduleKind, count: int) -> BlockPlan:
        if kind == "ffn":
            return best_neurons(block, scores.units(block.index), count)
        return best_kv_groups(scores.kv_groups[block.index], count)

    def cut(block: BlockView, kind: SubmoduleKind, count: int) -> tuple[BlockPlan, dict[str, Tensor]]:
        counts = starts[0].per_block if kind == "ffn" else starts[0].kv_groups
        start, decision = decide(block, kind, counts[part.blocks.index(block.index)]), decide(block, kind, count)
        return decision, compensate(block, decision, start)

    space = _search_space(search, part, starts)
    if not space.kinds:
        return starts[0], []
    with restored(view.model):
        fitness = CandidateFitness(context, space, search, cut, _fitness_key(context))
        counts, history = search.search(space, fitness)
    neurons, groups = list(starts[0].per_block), list(starts[0].kv_groups)
    for block, kind, count in zip(space.blocks, space.kinds, counts, strict=True):
        (neurons if kind == "ffn" else groups)[part.blocks.index(block)] = count
    return Widths(tuple(neurons), tuple(groups)), history


def _search_space(search: SearchingAllocator, part: _FreePart, starts: Sequence[Widths]) -> SearchSpace:
    """Return the slots that a search may change: the FFNs of the free blocks, then their attentions."""
    sizes = part.sizes
    rows: list[tuple[SubmoduleKind, int, Sequence[int], int]] = []
    if "ffn" in search.searched_kinds:
        legal = legal_widths(part.budget, sizes)
        rows += [("ffn", at, legal[at], sizes.neuron_parameters[at]) for at, n in enumerate(sizes.widths) if n]
    if "attention" in search.searched_kinds:
        groups = enumerate(sizes.kv_groups)
        rows += [("attention", at, range(1, n + 1), sizes.group_parameters[at]) for at, n in groups if n]
    return SearchSpace(
        kinds=tuple(kind for kind, *_ in rows),
        blocks=tuple(part.blocks[at] for _, at, *_ in rows),
        legal=tuple(tuple(counts) for _, _, counts, _ in rows),
        costs=tuple(cost for *_, cost in rows),
        starts=tuple(
            tuple((start.per_block if kind == "ffn" else start.kv_groups)[at] for kind, at, *_ in rows)
            for start in starts
        ),
    )


def _fitness_key(context: PlanContext) -> dict[str, Any]:
    """Return the key of the kept values: everything beside candidate, windows and measure that they depend on."""
    stride = None if context.gram_request is None else context.gram_request.stride
    return {**context.method, "allocator": None, "set": context.calibration.fingerprint, "stride": stride}
