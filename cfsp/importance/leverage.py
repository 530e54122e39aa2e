"""Ridge leverage scores of the neurons (MoDeGPT, arXiv 2408.09632): how little the others can stand in for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from cfsp.config.components import component
from cfsp.config.contracts import NeuronImportance
from cfsp.importance.second_order import cholesky, damped

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.views import Channels
    from cfsp.importance.base import Activation


@component
class Leverage(NeuronImportance):
    """Score channel j by diag(C (C + l I)^-1)_j, where C = X^T X / T are the channels' second moments.

    The score lies between 0 (a channel that is always 0) and 1 (one that the others cannot give); k equal channels get
    about 1 / k each. It reads no weights. With pruner.compensation=least_squares the output matrix gets MoDeGPT's
    Nystroem refit W C_:K C_KK^-1, up to the ridge.

    Attributes:
        ridge: l, relative to the mean of the diagonal of C.
    """

    requires = ("gram",)

    ridge: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-2

    def score(self, channels: Channels, activation: Activation) -> Tensor:
        import torch

        assert activation.gram is not None
        moments, level = damped(activation.gram, self.ridge)
        # C (C + l I)^-1 = I - l (C + l I)^-1
        inverse = torch.cholesky_inverse(cholesky(moments))
        return (1 - self.ridge * level * inverse.diagonal()).clamp_min(0) * (level > 0)
