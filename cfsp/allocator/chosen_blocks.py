"""Pruning only the most, or only the least, important blocks: a test of a block distance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cfsp.allocator.base import Allocation
from cfsp.config.components import component
from cfsp.config.contracts import Allocator
from cfsp.errors import BudgetError

if TYPE_CHECKING:
    from cfsp.importance.base import Scores
    from cfsp.sparsity.budget import Sizes


@component
class ChosenBlocks(Allocator):
    """Prune a share of the blocks equally, and keep the other blocks whole.

    Attributes:
        choose: whether the blocks with the highest (most) or lowest (least) distance are pruned.
        metric: block distance.
        share: share of the blocks that are pruned.
    """

    choose: Literal["most", "least"] = "least"
    metric: Literal["angular", "cosine", "mse", "mae"] = "angular"
    share: float = Field(default=0.25, gt=0, le=1)

    def block_distance(self) -> str:
        return self.metric

    def allocate(self, scores: Scores, sizes: Sizes, keep: float) -> Allocation:
        distance = scores.distances[self.metric]
        order = distance.argsort(descending=self.choose == "most", stable=True)
        chosen = order[: max(1, round(self.share * len(distance)))]
        parameters = distance.new_tensor(sizes.parameters)
        kept = 1 - (1 - keep) * sizes.removable / parameters[chosen].sum().item()
        if kept < 0:
            most = parameters[chosen].sum().item() / sizes.removable
            raise BudgetError(
                f"allocator.share={self.share}: the {len(chosen)} blocks hold {most:.1%} of what may go, the budget "
                f"asks for {1 - keep:.1%}; lower sparsity.ratio or raise allocator.share"
            )
        shares = distance.new_ones(len(distance))
        shares[chosen] = kept
        return Allocation(shares)
