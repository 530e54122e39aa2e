"""Allocation by a quadratic model of the loss: two trials for each block, and the exact optimum of the model."""

from __future__ import annotations

import heapq
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from cfsp.allocator.base import Allocation
from cfsp.allocator.evolution import fittest_start
from cfsp.allocator.search import Start, starting_allocators
from cfsp.config.components import component
from cfsp.config.contracts import Allocator, SearchingAllocator
from cfsp.system.progress import progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cfsp.allocator.search_space import Counts, SearchSpace
    from cfsp.config.contracts import Fitness
    from cfsp.importance.base import Scores
    from cfsp.sparsity.budget import Sizes

log = logging.getLogger(__name__)


@component
class Knapsack(SearchingAllocator):
    """Move to the optimum of a separable quadratic model of the loss, again and again while the loss falls.

    Around the present widths every block is tried with a smaller and with a larger width alone. A convex quadratic
    through these three losses is the model of the block. The widths that minimise the sum of the models within the
    tried range and the budget follow exactly, by marginal losses: a convex separable knapsack. They are measured;
    where the loss did not fall, the range is halved.

    Attributes:
        starts: closed-form allocations to start from.
        measure: kl: divergence of the next-token distributions from the dense model's; nll: loss.
        kl_entries: most probable entries of the dense distribution that kl looks at; the others count as one.
        rounds: how often the models are fitted.
        step_size: how much smaller and larger the tried widths are at first, as a share of the block's neurons.
        n_samples: calibration windows that a candidate is measured on, from the first; None: all.
    """

    starts: Annotated[list[Start], Field(min_length=1)]
    measure: Literal["nll", "kl"] = "kl"
    kl_entries: Annotated[int, Field(ge=1)] = 1024
    rounds: Annotated[int, Field(ge=1)] = 3
    step_size: Annotated[float, Field(gt=0, le=0.5)] = 0.125
    n_samples: Annotated[int, Field(ge=1)] | None = 8

    def allocate(self, scores: Scores, sizes: Sizes, keep: float) -> Allocation:
        """Return the first start, for callers that have no model to run."""
        return self.allocators()[0].allocate(scores, sizes, keep)

    def allocators(self) -> list[Allocator]:
        """See :class:`cfsp.config.contracts.SearchingAllocator`."""
        return starting_allocators(self.starts)

    def part_sizes(self, n_windows: int, window_tokens: int) -> list[int]:
        """See :class:`cfsp.config.contracts.SearchingAllocator`: every candidate is measured on the same windows."""
        return [n_windows if self.n_samples is None else min(self.n_samples, n_windows)]

    def search(self, space: SearchSpace, fitness: Fitness) -> tuple[Counts, list[dict[str, Any]]]:
        """See :class:`cfsp.config.contracts.SearchingAllocator`.

        Raises:
            RunError: no start has a finite fitness.
        """
        best, lowest = fittest_start(space, fitness, "knapsack")
        history = [space.describe(best, self.measure, lowest)]
        target, share = space.parameters(best), self.step_size
        for number in range(self.rounds):
            label = f"knapsack, round {number + 1}"
            slots = progress(range(len(best)), label, unit="block")
            models = [_model(space, fitness, best, lowest, slot, share) for slot in slots]
            candidate = optimum(space, best, models, target)
            value = fitness(candidate)
            log.info("%s: %s %.4f, %.4f before", label, self.measure.upper(), value, lowest)
            if value < lowest:
                best, lowest = candidate, value
                history.append(space.describe(best, self.measure, lowest))
            else:
                share /= 2
        return best, history


@dataclass(frozen=True)
class QuadraticModel:
    """Change of the loss when one slot keeps ``x`` legal steps more than now: slope x + curvature x^2 / 2.

    Attributes:
        slope: change of the loss per step.
        curvature: at least 0, so that the model is convex.
        fewest: lowest x that the model covers, at most 0.
        most: highest x that the model covers, at least 0.
    """

    slope: float
    curvature: float
    fewest: int
    most: int

    def change(self, steps: int) -> float:
        """Return the change of the loss after ``steps`` legal steps."""
        return self.slope * steps + self.curvature * steps * steps / 2


def _model(
    space: SearchSpace, fitness: Fitness, counts: Counts, value: float, slot: int, share: float
) -> QuadraticModel:
    """Measure one slot with fewer and with more units, and fit its model."""
    row = space.legal[slot]
    if counts[slot] not in row:  # a width that no rounding gives, such as that of a block that stays whole
        return QuadraticModel(0.0, 0.0, 0, 0)
    position, reach = row.index(counts[slot]), max(1, round(share * len(row)))
    fewest, most = -min(reach, position), min(reach, len(row) - 1 - position)
    changes = {}
    for steps in {fewest, most} - {0}:
        moved = space.with_moved_steps(counts, slot, steps)
        assert moved is not None
        changes[steps] = fitness(moved) - value
    return quadratic(changes)


def quadratic(changes: dict[int, float]) -> QuadraticModel:
    """Fit a convex quadratic through the origin and one or two measured changes.

    Args:
        changes: legal steps, one negative and one positive at most -> change of the loss.
    """
    fewest, most = min([0, *changes]), max([0, *changes])
    if fewest and most:
        below, above = changes[fewest] / fewest, changes[most] / most
        curvature = max(0.0, 2 * (above - below) / (most - fewest))
        # The slope of the parabola; without curvature, that of the line through the two measured points.
        slope = above - curvature * most / 2 if curvature else (changes[most] - changes[fewest]) / (most - fewest)
        return QuadraticModel(slope, curvature, fewest, most)
    reached = fewest or most
    return QuadraticModel(changes[reached] / reached if reached else 0.0, 0.0, fewest, most)


def optimum(space: SearchSpace, counts: Counts, models: Sequence[QuadraticModel], target: int) -> Counts:
    """Minimise the sum of the models within their ranges and the budget.

    Every slot begins with the fewest units of its model. The steps with the lowest change per parameter follow until
    the budget is met. As the models are convex, this is the optimum where all steps cost the same; otherwise it is at
    most one step away.

    Args:
        space: the search space.
        counts: the candidate that the models are around.
        models: model of each slot.
        target: parameters to keep.
    """
    at = [model.fewest for model in models]
    positions = [row.index(count) if count in row else None for row, count in zip(space.legal, counts, strict=True)]

    def step(slot: int) -> tuple[float, int, int] | None:
        """Return the change per parameter, the slot and the parameters of its next step; None at its end."""
        position = positions[slot]
        if position is None or at[slot] >= models[slot].most:
            return None
        row, now = space.legal[slot], position + at[slot]
        parameters = (row[now + 1] - row[now]) * space.costs[slot]
        change = models[slot].change(at[slot] + 1) - models[slot].change(at[slot])
        return change / parameters, slot, parameters

    kept = [
        count if position is None else row[position + steps]
        for row, count, position, steps in zip(space.legal, counts, positions, at, strict=True)
    ]
    missing = target - space.parameters(kept)
    heap = [entry for slot in range(len(counts)) if (entry := step(slot)) is not None]
    heapq.heapify(heap)
    while heap:
        _, slot, parameters = heapq.heappop(heap)
        if abs(missing - parameters) >= abs(missing):
            continue
        at[slot] += 1
        missing -= parameters
        if (entry := step(slot)) is not None:
            heapq.heappush(heap, entry)
    return tuple(
        count if position is None else row[position + steps]
        for row, count, position, steps in zip(space.legal, counts, positions, at, strict=True)
    )
