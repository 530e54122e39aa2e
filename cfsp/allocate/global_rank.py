"""Global ranking: z-scores within each block, then one threshold over all blocks (Wanda-SP and FLAP in FFN form)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsp.allocate.base import Allocation
from cfsp.components import component

if TYPE_CHECKING:
    from cfsp.allocate.budget import Sizes
    from cfsp.importance.base import Scores


@component
class GlobalRank:
    """Neurons in the order of (score - mean) / std of their block, kept until their parameters fill the budget."""

    def allocate(self, scores: Scores, sizes: Sizes, keep: float) -> Allocation:
        import torch

        standard = [((s - s.mean()) / s.std()).nan_to_num(0.0, 0.0, 0.0) for s in scores.neurons]
        owner = torch.cat([torch.full_like(z, block, dtype=torch.int64) for block, z in enumerate(standard)])
        order = torch.cat(standard).argsort(descending=True, stable=True)
        cost = torch.tensor(sizes.neuron_parameters, dtype=torch.float64)[owner[order]]
        kept = order[cost.cumsum(0) <= keep * sizes.ffn_parameters + cost / 2]
        counts = torch.bincount(owner[kept], minlength=len(standard)).double()
        return Allocation(counts / torch.tensor(sizes.widths, dtype=torch.float64), counted=True)
