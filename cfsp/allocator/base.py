"""The result of an allocator: the keep ratio of each block, before rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cfsp.config.contracts import Allocator

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Allocation", "Allocator"]


@dataclass(frozen=True)
class Allocation:
    """Keep ratios of the blocks.

    Attributes:
        keep: share of the neurons (or whole experts) of each block, [L] fp64.
        counted: whether keep ratio times number of units is already a whole number.
        keep_groups: share of the KV groups of each block, [L] fp64; None: the same as ``keep``.
    """

    keep: Tensor
    counted: bool = False
    keep_groups: Tensor | None = None
