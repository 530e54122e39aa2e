"""Units that a block can lose: neurons of its FFN, experts of its mixture, KV groups of its attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: Kinds of units. In a mixture, a neuron is the same neuron of every expert, since all experts keep one width.
UnitKind = Literal["neurons", "experts", "kv_groups"]


@dataclass(frozen=True)
class Units:
    """Units of one kind in one block.

    Attributes:
        n: number of units; 0 where the block has none of the kind, or none that is recognised.
        parameters: parameters that go with one unit.
        least: fewest units that may stay by the structure of the model; a budget may ask for more.
        step: units that leave at a time by the structure of the model.
    """

    n: int = 0
    parameters: int = 0
    least: int = 0
    step: int = 0

    @property
    def total(self) -> int:
        """Parameters of all units."""
        return self.n * self.parameters
