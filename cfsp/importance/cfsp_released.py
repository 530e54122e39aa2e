"""The neuron metrics of CFSP's released code (its lib/prune.py), kept to reproduce the authors' numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from cfsp.config.components import component
from cfsp.config.contracts import NeuronImportance

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.views import Channels
    from cfsp.importance.base import Activation

#: Exponent of X_i after the released normalisation, and how many matrices it sums over.
_WEIGHT_FREE = {"three_w_one_wa": (1.0, 3), "three_w_one_a": (1.0, 3), "one_wa": (1.0, 1), "one_a": (0.5, 1)}


@component
class CfspReleased(NeuronImportance):
    """Score a neuron as the released code does.

    That code divides each |W| by its own neuron's sum and averages over the hidden dimension d. A neuron's shares of
    itself sum to 1, so in the first four variants every weight cancels, and ``matrices / d * X_i ** exponent`` is left.
    It is written in that form here, because this is what the code computes. ``wanda_base`` is mean |Wd| X_i,
    ``mag_base`` the column norm of Wd.
    """

    variant: Literal["three_w_one_wa", "three_w_one_a", "one_wa", "one_a", "wanda_base", "mag_base"] = "three_w_one_wa"

    def score(self, channels: Channels, activation: Activation) -> Tensor:
        down = channels.output.weight.detach()
        if self.variant in _WEIGHT_FREE:
            exponent, matrices = _WEIGHT_FREE[self.variant]
            return matrices / down.shape[0] * activation.rms**exponent
        if self.variant == "wanda_base":
            return down.float().abs().mean(0) * activation.rms
        return down.float().norm(dim=0)
