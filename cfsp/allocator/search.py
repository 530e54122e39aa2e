"""Searched allocation: neurons move between blocks while the loss falls, starting from closed-form allocations."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from cfsp.allocator.base import Allocation
from cfsp.allocator.coarse import Coarse
from cfsp.allocator.reconstruction import Reconstruction
from cfsp.allocator.uniform import Uniform
from cfsp.config.components import component
from cfsp.config.contracts import Allocator
from cfsp.errors import RunError

if TYPE_CHECKING:
    from cfsp.importance.base import Scores
    from cfsp.sparsity.budget import Sizes

log = logging.getLogger(__name__)

#: Most transfers to try, the most promising first, before the step is halved.
_TRIED = 4


@component
class Search(Allocator):
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

    needs_model = True

    starts: Annotated[list[Literal["coarse", "uniform", "reconstruction"]], Field(min_length=1)]
    evaluations: Annotated[int, Field(ge=1)] = 150
    n_samples: Annotated[int, Field(ge=1)] | None = 32

    def allocate(self, scores: Scores, sizes: Sizes, keep: float) -> Allocation:
        """Return the first start, for callers that have no model to run."""
        return self.allocators()[0].allocate(scores, sizes, keep)

    def allocators(self) -> list[Allocator]:
        known: dict[str, Callable[[], Allocator]] = {
            "coarse": Coarse, "uniform": Uniform, "reconstruction": Reconstruction,
        }  # fmt: skip
        return [known[name]() for name in self.starts]

    def search(
        self,
        starts: Sequence[Sequence[int]],
        legal: Sequence[Sequence[int]],
        costs: Sequence[int],
        loss: Callable[[tuple[int, ...]], float],
    ) -> tuple[tuple[int, ...], list[dict[str, Any]]]:
        """See :class:`cfsp.config.contracts.SearchingAllocator`. A loss that was measured before costs nothing.

        Raises:
            RunError: no start has a finite loss.
        """
        budget = _EvaluationBudget(loss, self.evaluations)
        losses = {tuple(widths): budget.loss(tuple(widths)) for widths in starts}
        best = min(losses, key=lambda widths: losses[widths])
        lowest = losses[best]
        if not math.isfinite(lowest):
            raise RunError("allocator=search: the loss of every start is not finite; try model.dtype=float32")
        history: list[dict[str, Any]] = [{"widths": list(best), "nll": lowest}]
        transfers = _Transfers(legal, costs, target=_parameters(best, costs))
        steps = max(1, max(len(row) for row in legal) // 8)
        while budget.remaining > 0:
            better = _best_transfer(transfers, budget, best, lowest, steps)
            if better is not None:
                best, lowest = better
                history.append({"widths": list(best), "nll": lowest})
            elif steps == 1:
                break
            else:
                steps //= 2
        log.info("search: %d candidates, NLL %.4f to %.4f", budget.measured, history[0]["nll"], lowest)
        return best, history


class _EvaluationBudget:
    """Counter of the remaining evaluations; measures each loss once."""

    def __init__(self, loss: Callable[[tuple[int, ...]], float], evaluations: int) -> None:
        self._loss, self._losses = loss, dict[tuple[int, ...], float]()
        self.remaining, self.measured = evaluations, 0

    def loss(self, widths: tuple[int, ...]) -> float:
        """Return the loss of the model with these widths; infinity where it is not finite."""
        if widths not in self._losses:
            value = self._loss(widths)
            self._losses[widths] = value if math.isfinite(value) else math.inf
            self.remaining -= 1
            self.measured += 1
        return self._losses[widths]


class _Transfers:
    """Moves of neurons within the legal widths of the blocks.

    Args:
        legal: legal widths of each block, ascending.
        costs: parameters of one neuron of each block.
        target: parameters that all blocks together keep.
    """

    def __init__(self, legal: Sequence[Sequence[int]], costs: Sequence[int], target: int) -> None:
        self._legal, self._costs, self._target = legal, costs, target
        gaps = [
            (after - before) * cost for row, cost in zip(legal, costs, strict=True) for before, after in pairwise(row)
        ]
        self._slack = max(gaps, default=0) / 2

    def with_moved_steps(self, widths: tuple[int, ...], block: int, steps: int) -> tuple[int, ...] | None:
        """Return the widths with ``steps`` legal steps more in one block (fewer, if negative); None if impossible."""
        row = self._legal[block]
        position = row.index(widths[block]) + steps if widths[block] in row else -1
        if not 0 <= position < len(row):
            return None
        return (*widths[:block], row[position], *widths[block + 1 :])

    def with_transferred_steps(
        self, widths: tuple[int, ...], giver: int, taker: int, steps: int
    ) -> tuple[int, ...] | None:
        """Return the widths after moving ``steps`` legal steps from one block to another; None if impossible."""
        smaller = self.with_moved_steps(widths, giver, -steps)
        candidate = None if smaller is None else self.with_moved_steps(smaller, taker, steps)
        if candidate is None or abs(_parameters(candidate, self._costs) - self._target) > self._slack:
            return None
        return candidate


def _best_transfer(
    transfers: _Transfers, budget: _EvaluationBudget, best: tuple[int, ...], lowest: float, steps: int
) -> tuple[tuple[int, ...], float] | None:
    """Try the most promising transfers of ``steps`` legal steps between two blocks.

    A transfer promises the sum of the changes in loss that its two moves make alone.

    Returns:
        The first transfer with a loss below ``lowest``, and its loss; None if no tried transfer lowers the loss.
    """
    change_if_smaller: dict[int, float] = {}
    change_if_larger: dict[int, float] = {}
    for block in range(len(best)):
        for direction, changes in ((-steps, change_if_smaller), (steps, change_if_larger)):
            candidate = transfers.with_moved_steps(best, block, direction)
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
        candidate = transfers.with_transferred_steps(best, giver, taker, steps)
        if candidate is not None and (loss := budget.loss(candidate)) < lowest:
            return candidate, loss
    return None


def _parameters(widths: Sequence[int], costs: Sequence[int]) -> int:
    """Return the parameters of FFNs with these widths."""
    return sum(width * cost for width, cost in zip(widths, costs, strict=True))
