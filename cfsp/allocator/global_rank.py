"""Global ranking: z-scores within each block, then one threshold over all blocks (Wanda-SP, FLAP's AL-AM)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsp.allocator.filling import fill_budget
from cfsp.config.components import component
from cfsp.config.contracts import Allocator

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.allocator.base import Allocation
    from cfsp.importance.base import Scores
    from cfsp.sparsity.budget import Sizes


@component
class GlobalRank(Allocator):
    """Keep the units with the highest (score - mean) / std of their block until their parameters fill the budget.

    A KV group counts with the mean z-score of its channels, and weighs as much as its parameters.
    """

    def allocate(self, scores: Scores, sizes: Sizes, keep: float) -> Allocation:
        neurons = [_standard(scores) for scores in scores.neurons]
        return fill_budget(neurons, [_standard(scores).mean(1) for scores in scores.kv_groups], sizes, keep)


def _standard(scores: Tensor) -> Tensor:
    if scores.numel() < 2:
        return scores * 0
    return ((scores - scores.mean()) / scores.std()).nan_to_num(0.0, 0.0, 0.0)
