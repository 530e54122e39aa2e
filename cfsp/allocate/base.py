"""What an allocator is: scores and a keep fraction -> how many neurons each block would keep, before rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.allocate.budget import Sizes
    from cfsp.importance.base import Scores


@dataclass(frozen=True)
class Allocation:
    """``keep`` [L] fp64: kept share of each block. ``counted``: keep * N is a whole number of neurons already."""

    keep: Tensor
    counted: bool = False


class Allocator(Protocol):
    """One class, one file, one YAML. The parameter-weighted mean of the keep ratios must be ``keep``."""

    def allocate(self, scores: Scores, sizes: Sizes, keep: float) -> Allocation:
        """Split the kept fraction ``keep`` (0 < keep <= 1) of all FFN parameters over the blocks."""
        ...
