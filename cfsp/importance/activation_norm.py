"""Activation norm: how strongly a neuron fires on the calibration set, weights aside."""

from __future__ import annotations

from torch import Tensor

from cfsp.components import component
from cfsp.models.views import BlockView


@component
class ActivationNorm:
    """X_i, the root mean square of the input of down_proj."""

    def score(self, block: BlockView, activation: Tensor) -> Tensor:
        return activation
