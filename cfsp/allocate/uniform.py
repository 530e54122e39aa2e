"""Uniform allocation: the same ratio in every block."""

from __future__ import annotations

import torch

from cfsp.allocate.base import Allocation
from cfsp.allocate.budget import Sizes
from cfsp.components import component
from cfsp.importance.base import Scores


@component
class Uniform:
    """keep_l = keep."""

    def allocate(self, scores: Scores, sizes: Sizes, keep: float) -> Allocation:
        return Allocation(torch.full((len(sizes.widths),), keep, dtype=torch.float64))
