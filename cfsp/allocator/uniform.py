"""Uniform allocation: the same ratio in every block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsp.allocator.base import Allocation
from cfsp.config.components import component
from cfsp.config.contracts import Allocator

if TYPE_CHECKING:
    from cfsp.importance.base import Scores
    from cfsp.sparsity.budget import Sizes


@component
class Uniform(Allocator):
    """Keep the same share of every block: keep_l = keep."""

    keeps_shares_equal = True

    def allocate(self, scores: Scores, sizes: Sizes, keep: float) -> Allocation:
        import torch

        return Allocation(torch.full((len(sizes.widths),), keep, dtype=torch.float64))
