"""FLAP's fluctuation metrics (arXiv 2312.11983): variance of a channel's activation times its output weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from cfsp.config.components import component
from cfsp.config.contracts import NeuronImportance

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.views import Channels
    from cfsp.importance.base import Activation


@component
class Flap(NeuronImportance):
    """Score a channel by how much its activation varies, and by its output weights W (down_proj, or o_proj for heads).

    Attributes:
        variant: wifv: Var(X_i) * sum_j W[j,i]^2; ifv: Var(X_i); wifn: mean_j |W[j,i]| * sqrt(mean X_i^2).
        square_heads: whether the scores of heads are squared, as the released code does before it standardises them.
    """

    variant: Literal["wifv", "ifv", "wifn"] = "wifv"
    square_heads: bool = True

    def score(self, channels: Channels, activation: Activation) -> Tensor:
        weight = channels.output.weight.detach().float()
        if self.variant == "wifn":
            scores = weight.abs().mean(0) * activation.rms
        else:
            scores = activation.variance * (weight.square().sum(0) if self.variant == "wifv" else 1)
        return scores.square() if self.square_heads and channels.kind == "attention" else scores
