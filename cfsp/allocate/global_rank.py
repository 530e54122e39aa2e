"""Global ranking: z-scores within each block, then one threshold over all blocks (Wanda-SP, FLAP's AL-AM)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsp.allocate.base import Allocation
from cfsp.components import component

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.allocate.budget import Sizes
    from cfsp.importance.base import Scores


@component
class GlobalRank:
    """Units in the order of (score - mean) / std of their block, kept until their parameters fill the budget.

    A KV group counts with the mean z-score of its channels and weighs what its parameters weigh.
    """

    def allocate(self, scores: Scores, sizes: Sizes, keep: float) -> Allocation:
        import torch

        ranked = [_standard(s) for s in scores.neurons] + [_standard(s).mean(1) for s in scores.kv_groups]
        costs = torch.tensor(sizes.neuron_parameters + sizes.group_parameters, dtype=torch.float64)
        owner = torch.repeat_interleave(torch.arange(len(ranked)), torch.tensor([z.numel() for z in ranked]))
        order = torch.cat(ranked).argsort(descending=True, stable=True)
        filled = costs[owner[order]].cumsum(0)
        # Half a unit more than the budget is nearer to it than half a unit less.
        n_kept = int((filled - costs[owner[order]] / 2 <= keep * sizes.removable).cumprod(0).sum())
        counts = torch.bincount(owner[order[:n_kept]], minlength=len(ranked)).double()
        neurons, groups = counts.split(len(scores.neurons))
        return Allocation(_share(neurons, sizes.widths), counted=True, keep_groups=_share(groups, sizes.kv_groups))


def _standard(scores: Tensor) -> Tensor:
    if scores.numel() < 2:
        return scores * 0
    return ((scores - scores.mean()) / scores.std()).nan_to_num(0.0, 0.0, 0.0)


def _share(counts: Tensor, of: tuple[int, ...]) -> Tensor:
    return (counts / counts.new_tensor(of)).nan_to_num(1.0)
