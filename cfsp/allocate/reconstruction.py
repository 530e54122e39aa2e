"""Allocation by reconstruction error: scores say what a removal adds to it, and the cheapest go, wherever they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from cfsp.allocate.base import Allocation
from cfsp.components import component

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.allocate.budget import Sizes
    from cfsp.importance.base import Scores


@component
class Reconstruction:
    """Widths that minimise the sum of the blocks' output errors, for scores that are increments of such an error.

    With ``importance=obs`` the error of a block as a function of its width is the sum of its lowest scores, which is
    convex, so taking the lowest scores of all blocks per parameter until the budget is met is the optimum.
    ``weighted``: errors count relative to how much the block moves the hidden state (mse: its squared change).
    """

    weighted: Literal["none", "mse"] = "mse"

    def allocate(self, scores: Scores, sizes: Sizes, keep: float) -> Allocation:
        import torch

        change = scores.distances["mse"] if self.weighted == "mse" else torch.ones(len(scores.neurons)).double()
        change = change.clamp_min(float(change[change > 0].min()) if bool((change > 0).any()) else 1.0)
        neurons = [s / c / cost for s, c, cost in zip(scores.neurons, change, sizes.neuron_parameters, strict=True)]
        groups = [
            s.sum(1) / c / cost for s, c, cost in zip(scores.kv_groups, change, sizes.group_parameters, strict=True)
        ]
        ranked = neurons + groups
        costs = torch.tensor(sizes.neuron_parameters + sizes.group_parameters, dtype=torch.float64)
        owner = torch.repeat_interleave(torch.arange(len(ranked)), torch.tensor([r.numel() for r in ranked]))
        order = torch.cat(ranked).argsort(descending=True, stable=True)
        filled = costs[owner[order]].cumsum(0)
        n_kept = int((filled - costs[owner[order]] / 2 <= keep * sizes.removable).cumprod(0).sum())
        counts = torch.bincount(owner[order[:n_kept]], minlength=len(ranked)).double()
        kept, kept_groups = counts.split(len(scores.neurons))
        return Allocation(_share(kept, sizes.widths), counted=True, keep_groups=_share(kept_groups, sizes.kv_groups))


def _share(counts: Tensor, of: tuple[int, ...]) -> Tensor:
    return (counts / counts.new_tensor(of)).nan_to_num(1.0)
