"""Magnitude: the L2 norm of the output weights (Magnitude-SP)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsp.config.components import component
from cfsp.config.contracts import NeuronImportance

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.views import Channels
    from cfsp.importance.base import Activation


@component
class Magnitude(NeuronImportance):
    """Score a channel by the L2 norm of its column of down_proj (o_proj for the channels of heads)."""

    def score(self, channels: Channels, activation: Activation) -> Tensor:
        return channels.output.weight.detach().float().norm(dim=0)
