"""Wanda, structured: weight magnitude times activation, averaged over a channel's output weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsp.config.components import component
from cfsp.config.contracts import NeuronImportance

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.views import Channels
    from cfsp.importance.base import Activation


@component
class Wanda(NeuronImportance):
    """Score a channel by mean_j |W[j, i]| * sqrt(mean X_i^2), W = down_proj (o_proj for the channels of heads)."""

    def score(self, channels: Channels, activation: Activation) -> Tensor:
        return channels.output.weight.detach().float().abs().mean(0) * activation.rms
