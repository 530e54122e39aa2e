"""Allocation by block influence: the softmax of -BI spreads what is removed (MoDeGPT, arXiv 2408.09632)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from cfsp.allocator.base import Allocation
from cfsp.config.components import component
from cfsp.config.contracts import Allocator

if TYPE_CHECKING:
    from cfsp.importance.base import Scores
    from cfsp.sparsity.budget import Sizes


@component
class BlockInfluence(Allocator):
    """Remove more from the blocks that change the direction of the hidden state less.

    A block loses the share s_l = c exp(-BI_l / epsilon) of its removable parameters, where BI_l = 1 - cos(entering,
    leaving) is its influence and c meets the budget. Of L blocks of one size this is L s softmax(-BI / epsilon)_l for
    the mean share s. No share exceeds ``max_sparsity``: the other blocks take over the excess in the same proportions.

    Attributes:
        epsilon: temperature; large values remove the same from every block.
        max_sparsity: largest share of a block that goes. A budget that asks for more takes the same from every block.
    """

    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.15
    max_sparsity: Annotated[float, Field(gt=0, le=1)] = 0.95

    def block_distance(self) -> str:
        return "cosine"

    def allocate(self, scores: Scores, sizes: Sizes, keep: float) -> Allocation:
        import torch

        influence = scores.distances["cosine"]
        weight = influence.new_tensor(sizes.parameters) / sizes.removable
        sparsity, most = 1 - keep, max(self.max_sparsity, 1 - keep)
        is_free = torch.ones_like(influence, dtype=torch.bool)
        while True:
            excluded = weight[~is_free].sum() * most
            spread = (-influence / self.epsilon).masked_fill(~is_free, -torch.inf).softmax(0)
            share = ((sparsity - excluded) * spread / (weight * spread).sum()).nan_to_num(most)
            above = is_free & (share > most)
            if not bool(above.any()):
                return Allocation(1 - torch.where(is_free, share, most))
            is_free &= ~above
