"""Magnitude: the L2 norm of the neuron's output weights (Magnitude-SP)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsp.components import component

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.models.views import BlockView


@component
class Magnitude:
    """L2 norm of column i of down_proj."""

    def score(self, block: BlockView, activation: Tensor) -> Tensor:
        return block.ffn.down.weight.detach().float().norm(dim=0)
