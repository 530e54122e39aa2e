"""CFSP's fine importance (arXiv 2409.13199, Eq. 8): relative activation x relative weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsp.config.components import component
from cfsp.config.contracts import NeuronImportance
from cfsp.importance.base import shares

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.views import Channels
    from cfsp.importance.base import Activation


@component
class Cfsp(NeuronImportance):
    """Score a neuron by its share of the activation times its share of the weights.

    S_i = F_i * X_i / sum X with
    F_i = sum_j |Wd[j,i]| X_i / sum_i' |Wd[j,i']| X_i'  +  sum_j |Wu[i,j]| / sum_i' |Wu[i',j]|  +  the same for Wg,
    where j runs over the hidden dimensions. Each matrix is read once: both sums of a share are matrix-vector products.
    The channels of heads, which the paper does not prune, are scored with o in the place of Wd and q, k, v in the
    place of Wu and Wg.
    """

    def score(self, channels: Channels, activation: Activation) -> Tensor:
        *inputs, output = (weight.abs() for weight in channels.weights())
        ones, norm = activation.rms.new_ones(output.shape[0]), activation.rms
        shared = norm * (output.T @ shares(ones, output @ norm))
        for weight in reversed(inputs):
            shared = shared + weight @ shares(ones, weight.sum(0))
        return shared * shares(norm, norm.sum())
