"""An allocator that lets each block keep more than the one before."""

from __future__ import annotations

from cfsp.allocator.base import Allocation
from cfsp.components import component


@component
class Rising:
    slope: float = 0.1

    def allocate(self, scores, sizes, keep):
        import torch

        steps = torch.linspace(-self.slope, self.slope, len(sizes.widths), dtype=torch.float64)
        return Allocation(keep * (1 + steps))
