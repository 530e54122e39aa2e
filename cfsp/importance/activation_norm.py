"""Activation norm: RMS activation of a channel on the calibration set, without its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsp.config.components import component
from cfsp.config.contracts import NeuronImportance

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.views import Channels
    from cfsp.importance.base import Activation


@component
class ActivationNorm(NeuronImportance):
    """Score a channel by X_i, the root mean square of its activation."""

    def score(self, channels: Channels, activation: Activation) -> Tensor:
        return activation.rms
