"""Activation norm: how strongly a neuron fires on the calibration set, weights aside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsp.components import component

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.models.views import BlockView


@component
class ActivationNorm:
    """X_i, the root mean square of the input of down_proj."""

    def score(self, block: BlockView, activation: Tensor) -> Tensor:
        return activation
