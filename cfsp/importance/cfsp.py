"""CFSP's fine importance (arXiv 2409.13199, Eq. 8): relative activation x relative weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsp.components import component
from cfsp.importance.base import shares

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.models.views import BlockView


@component
class Cfsp:
    """S_i = F_i * X_i / sum X, where F_i adds the neuron's share of the weight at every hidden dimension j.

    F_i = sum_j |Wd[j,i]| X_i / sum_i' |Wd[j,i']| X_i'  +  sum_j |Wu[i,j]| / sum_i' |Wu[i',j]|  +  the same for Wg.
    Each matrix is read once: both sums of a share are matrix-vector products.
    """

    def score(self, block: BlockView, activation: Tensor) -> Tensor:
        gate, up, down = (weight.abs() for weight in block.ffn.weights())
        ones = activation.new_ones(down.shape[0])
        shared = activation * (down.T @ shares(ones, down @ activation))
        for weight in (up, gate):
            shared = shared + weight @ shares(ones, weight.sum(0))
        return shared * shares(activation, activation.sum())
