"""Filling a budget with the highest-ranked units of all blocks: shared by the allocators that rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cfsp.allocator.base import Allocation

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.sparsity.budget import Sizes


def fill_budget(neurons: Sequence[Tensor], groups: Sequence[Tensor], sizes: Sizes, keep: float) -> Allocation:
    """Keep the highest-ranked units until their parameters fill the fraction ``keep`` of the removable ones.

    Args:
        neurons: rank of each neuron [N], per block.
        groups: rank of each KV group [groups], per block.
    """
    import torch

    ranked = [*neurons, *groups]
    costs = torch.tensor(sizes.neuron_parameters + sizes.group_parameters, dtype=torch.float64)
    owner = torch.repeat_interleave(torch.arange(len(ranked)), torch.tensor([ranks.numel() for ranks in ranked]))
    order = torch.cat(ranked).argsort(descending=True, stable=True)
    total = costs[owner[order]].cumsum(0)
    # A unit that crosses the budget is kept if that is nearer to it.
    n_kept = int((total - costs[owner[order]] / 2 <= keep * sizes.removable).cumprod(0).sum())
    counts = torch.bincount(owner[order[:n_kept]], minlength=len(ranked)).double()
    kept, kept_groups = counts.split(len(neurons))
    return Allocation(_share(kept, sizes.widths), counted=True, keep_groups=_share(kept_groups, sizes.kv_groups))


def _share(counts: Tensor, totals: tuple[int, ...]) -> Tensor:
    return (counts / counts.new_tensor(totals)).nan_to_num(1.0)
