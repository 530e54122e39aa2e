"""What an allocator is: scores and a keep fraction -> how much each block would keep, before rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.allocate.budget import Sizes
    from cfsp.importance.base import Scores


@dataclass(frozen=True)
class Allocation:
    """``keep`` [L] fp64: kept share of each block's neurons; ``keep_groups`` of its KV groups (None: the same share).

    ``counted``: share times number is a whole number already.
    """

    keep: Tensor
    counted: bool = False
    keep_groups: Tensor | None = None


class Allocator(Protocol):
    """One class, one file, one YAML. The parameter-weighted mean of the keep ratios must be ``keep``.

    ``scores`` and ``sizes`` hold the blocks that may be pruned, in order.
    """

    def allocate(self, scores: Scores, sizes: Sizes, keep: float) -> Allocation:
        """Split the kept fraction ``keep`` (0 < keep <= 1) of all removable parameters over the blocks."""
        ...
