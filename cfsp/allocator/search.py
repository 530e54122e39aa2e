"""Searched allocation: neurons move between blocks while the loss falls, starting from closed-form allocations."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from cfsp.allocator.base import Allocation
from cfsp.allocator.coarse import Coarse
from cfsp.allocator.reconstruction import Reconstruction
from cfsp.allocator.uniform import Uniform
from cfsp.config.components import component
from cfsp.config.contracts import Allocator, SearchingAllocator
from cfsp.errors import RunError

if TYPE_CHECKING:
    from cfsp.allocator.search_space import Counts, SearchSpace
    from cfsp.config.contracts import Fitness
    from cfsp.importance.base import Scores
    from cfsp.sparsity.budget import Sizes

log = logging.getLogger(__name__)

#: Most transfers to try, the most promising first, before the step is halved.
_TRIED = 4
#: Closed-form allocations that a search may start from.
Start = Literal["coarse", "uniform", "reconstruction"]


@component
class Search(SearchingAllocator):
    """Search for the widths with the lowest loss on calibration windows.

    Every start is measured. From the best one on, neurons move from one block to another: an eighth of the
    width at first, halved when no transfer helps, down to one legal step. The change in loss when a single block gets
    smaller or larger tells which transfers to try. A loss is the mean NLL of the model with these widths, compensated
    as the pruner says (by least squares where the pruner goes on with Gauss-Newton).

    Attributes:
        starts: closed-form allocations to start from.
        evaluations: largest number of measured candidates.
        n_samples: calibration windows that a loss is measured on, from the first; None: all.
    """

    starts: Annotated[list[Start], Field(min_length=1)]
    evaluations: Annotated[int, Field(ge=1)] = 150
    n_samples: Annotated[int, Field(ge=1)] | None = 32

    def allocate(self, scores: Scores, sizes: Sizes, keep: float) -> Allocation:
        """Return the first start, for callers that have no model to run."""
        return self.allocators()[0].allocate(scores, sizes, keep)

    def allocators(self) -> list[Allocator]:
        """See :class:`cfsp.config.contracts.SearchingAllocator`."""
        return starting_allocators(self.starts)

    def part_sizes(self, n_windows: int, window_tokens: int) -> list[int]:
        """See :class:`cfsp.config.contracts.SearchingAllocator`: every loss is measured on the same windows."""
        return [n_windows if self.n_samples is None else min(self.n_samples, n_windows)]

    def search(self, space: SearchSpace, fitness: Fitness) -> tuple[Counts, list[dict[str, Any]]]:
        """See :class:`cfsp.config.contracts.SearchingAllocator`. A loss that was measured before costs nothing.

        Raises:
            RunError: no start has a finite loss.
        """
        budget = _EvaluationBudget(fitness, self.evaluations)
        losses = {counts: budget.loss(counts) for counts in space.starts}
        best = min(losses, key=lambda counts: losses[counts])
        lowest = losses[best]
        if not math.isfinite(lowest):
            raise RunError("allocator=search: the loss of every start is not finite; try model.dtype=float32")
        history = [space.describe(best, self.measure, lowest)]
        target = space.parameters(best)
        steps = max(1, max(len(row) for row in space.legal) // 8)
        while budget.remaining > 0:
            better = _best_transfer(space, budget, best, lowest, steps, target)
            if better is not None:
                best, lowest = better
                history.append(space.describe(best, self.measure, lowest))
            elif steps == 1:
                break
            else:
                steps //= 2
        log.info("search: %d candidates, NLL %.4f to %.4f", budget.measured, history[0]["nll"], lowest)
        return best, history


def starting_allocators(names: Sequence[Start]) -> list[Allocator]:
    """Return the closed-form allocations that a search starts from, by their names in the configuration."""
    known: dict[str, Callable[[], Allocator]] = {
        "coarse": Coarse, "uniform": Uniform, "reconstruction": Reconstruction,
    }  # fmt: skip
    return [known[name]() for name in names]


class _EvaluationBudget:
    """Counter of the remaining evaluations; measures each loss once."""

    def __init__(self, fitness: Fitness, evaluations: int) -> None:
        self._fitness = fitness
        self._losses: dict[Counts, float] = {}
        self.remaining, self.measured = evaluations, 0

    def loss(self, counts: Counts) -> float:
        """Return the loss of the model with these widths; infinity where it is not finite."""
        if counts not in self._losses:
            value = self._fitness(counts)
            self._losses[counts] = value if math.isfinite(value) else math.inf
            self.remaining -= 1
            self.measured += 1
        return self._losses[counts]


def _best_transfer(
    space: SearchSpace, budget: _EvaluationBudget, best: Counts, lowest: float, steps: int, target: int
) -> tuple[Counts, float] | None:
    """Try the most promising transfers of ``steps`` legal steps between two blocks.

    A transfer promises the sum of the changes in loss that its two moves make alone.

    Returns:
        The first transfer with a loss below ``lowest``, and its loss; None if no tried transfer lowers the loss.
    """
    change_if_smaller: dict[int, float] = {}
    change_if_larger: dict[int, float] = {}
    for block in range(len(best)):
        for direction, changes in ((-steps, change_if_smaller), (steps, change_if_larger)):
            candidate = space.with_moved_steps(best, block, direction)
            if candidate is not None and budget.remaining > 0:
                changes[block] = budget.loss(candidate) - lowest
    promises = [
        (change_if_smaller[giver] + change_if_larger[taker], giver, taker)
        for giver in change_if_smaller
        for taker in change_if_larger
        if giver != taker
    ]
    for _, giver, taker in sorted(promises)[:_TRIED]:
        if budget.remaining <= 0:
            break
        candidate = space.with_transferred_steps(best, giver, taker, steps, target)
        if candidate is not None and (loss := budget.loss(candidate)) < lowest:
            return candidate, loss
    return None
