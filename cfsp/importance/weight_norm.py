"""LLM-Pruner's L1 and L2 importance of coupled groups (arXiv 2305.11627): needs no data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from cfsp.config.components import component
from cfsp.config.contracts import NeuronImportance

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.views import Channels
    from cfsp.importance.base import Activation


@component
class WeightNorm(NeuronImportance):
    """Score a channel by sum |W|^p over its coupled group: all weights that are removed with it."""

    p: Literal[1, 2] = 1

    def score(self, channels: Channels, activation: Activation) -> Tensor:
        # Start-up time: loads torch.
        from cfsp.importance.coupled import coupled

        projections = channels.part.projections
        return coupled(
            channels,
            {
                name: self._sum(projection.weight, 0 if name in ("down", "o") else 1)
                for name, projection in projections.items()
            },
        )

    def _sum(self, weight: Tensor, axis: int) -> Tensor:
        return weight.detach().float().abs().pow(self.p).sum(axis)
