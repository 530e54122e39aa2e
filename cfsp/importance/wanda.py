"""Wanda, structured: weight magnitude times activation, averaged over a neuron's output weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsp.components import component

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.models.views import BlockView


@component
class Wanda:
    """mean over rows j of |Wd[j, i]| * sqrt(mean X_i^2)."""

    def score(self, block: BlockView, activation: Tensor) -> Tensor:
        return block.ffn.down.weight.detach().float().abs().mean(0) * activation
