"""2SSP's first stage (arXiv 2501.17771): the mean norm of a channel's activation over a sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsp.config.components import component
from cfsp.config.contracts import NeuronImportance

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.views import Channels
    from cfsp.importance.base import Activation


@component
class SequenceNorm(NeuronImportance):
    """Score a channel by the mean over the sequences of the L2 norm over a sequence's tokens."""

    def score(self, channels: Channels, activation: Activation) -> Tensor:
        return activation.mean_norm
