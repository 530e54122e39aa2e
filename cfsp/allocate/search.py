"""Searched allocation: from the best of some closed forms on, neurons move between blocks while the loss falls."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from cfsp.allocate.base import Allocation
from cfsp.components import component
from cfsp.contracts import Allocator
from cfsp.errors import RunError

if TYPE_CHECKING:
    from cfsp.allocate.budget import Sizes
    from cfsp.importance.base import Scores

log = logging.getLogger(__name__)

#: Transfers that are tried, the most promising first, before the step is halved.
_TRIED = 4


@component
class Search(Allocator):
    """Widths with the lowest loss on calibration windows that ``evaluations`` candidates find.

    Each of ``starts`` is tried; from the best one on, neurons go from one block to another (an eighth of the width at
    first, halved when no transfer helps, down to one legal step). What giving to or taking from a single block changes
    tells which transfers to try. A loss is the mean NLL of the first ``n_samples`` calibration windows (null: all) in
    the model with these widths, compensated as the pruner says (by least squares where it goes on with Gauss-Newton).
    """

    needs_model = True

    starts: Annotated[list[Literal["coarse", "uniform", "reconstruction"]], Field(min_length=1)]
    evaluations: Annotated[int, Field(ge=1)] = 150
    n_samples: Annotated[int, Field(ge=1)] | None = 32

    def allocate(self, scores: Scores, sizes: Sizes, keep: float) -> Allocation:
        """The first start alone: what there is without a model to run."""
        return self.allocators()[0].allocate(scores, sizes, keep)

    def allocators(self) -> list[Allocator]:
        from cfsp.allocate.coarse import Coarse
        from cfsp.allocate.reconstruction import Reconstruction
        from cfsp.allocate.uniform import Uniform

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
        """The best widths found, and how they were reached.

        Args:
            starts: widths that meet the budget. legal: of each block, ascending. costs: parameters of a neuron.
            loss: of widths; what was asked before costs nothing.

        Raises:
            RunError: no start has a finite loss.
        """
        spent = _Spent(loss, self.evaluations)
        found = {tuple(widths): spent(tuple(widths)) for widths in starts}
        best = min(found, key=lambda widths: found[widths])
        history: list[dict[str, Any]]
        if not math.isfinite(found[best]):
            raise RunError("allocator=search: the loss of every start is not finite; try model.dtype=float32")
        lowest, history = found[best], [{"widths": list(best), "nll": found[best]}]
        target = sum(width * cost for width, cost in zip(best, costs, strict=True))
        gaps = [
            (after - before) * cost for row, cost in zip(legal, costs, strict=True) for before, after in pairwise(row)
        ]
        slack = max(gaps, default=0) / 2
        steps = max(1, max(len(row) for row in legal) // 8)
        while spent.left > 0:
            moves = {}
            for block in range(len(best)):
                for direction in (-steps, steps):
                    moved = _moved(best, legal, block, direction)
                    if moved is not None and spent.left > 0:
                        moves[block, direction] = spent(moved) - lowest
            pairs = [(moves[i, -steps] + moves[j, steps], i, j) for i, a in moves for j, b in moves
                     if a < 0 < b and i != j]  # fmt: skip
            better = None
            for _, giver, taker in sorted(pairs)[:_TRIED]:
                taken = _moved(best, legal, giver, -steps)
                candidate = None if taken is None else _moved(taken, legal, taker, steps)
                if candidate is None or spent.left <= 0:
                    continue
                total = sum(width * cost for width, cost in zip(candidate, costs, strict=True))
                if abs(total - target) > slack:
                    continue
                value = spent(candidate)
                if value < lowest:
                    better, lowest = candidate, value
                    break
            if better is not None:
                best = better
                history.append({"widths": list(best), "nll": lowest})
            elif steps == 1:
                break
            else:
                steps //= 2
        log.info("search: %d candidates, NLL %.4f to %.4f", spent.asked, history[0]["nll"], lowest)
        return best, history


class _Spent:
    """Losses, each measured once, with what may still be spent."""

    def __init__(self, loss: Callable[[tuple[int, ...]], float], evaluations: int) -> None:
        self._loss, self._known = loss, dict[tuple[int, ...], float]()
        self.left, self.asked = evaluations, 0

    def __call__(self, widths: tuple[int, ...]) -> float:
        if widths not in self._known:
            value = self._loss(widths)
            self._known[widths] = value if math.isfinite(value) else math.inf
            self.left -= 1
            self.asked += 1
        return self._known[widths]


def _moved(widths: tuple[int, ...], legal: Sequence[Sequence[int]], block: int, steps: int) -> tuple[int, ...] | None:
    """With ``steps`` legal steps more in one block; None where there are not so many."""
    at = legal[block].index(widths[block]) + steps if widths[block] in legal[block] else -1
    if not 0 <= at < len(legal[block]):
        return None
    return (*widths[:block], legal[block][at], *widths[block + 1 :])
