"""LLM-Pruner's Taylor importance of coupled groups (arXiv 2305.11627), from real gradients of the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from cfsp.config.components import component
from cfsp.config.contracts import NeuronImportance

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.views import Channels
    from cfsp.importance.base import Activation


@component
class Taylor(NeuronImportance):
    """Score a channel by a Taylor expansion of the loss over its coupled group.

    The coupled group of a neuron is its row of gate, its row of up and its column of down; that of a KV group its rows
    of q, k, v and its columns of o. With g the gradient of the mean loss and F the mean squared gradient per sequence:

    Attributes:
        variant: element1: sum |W g|; element2: sum |W F W|; mix: sum |W g - W F W / 2|; vector: sum over the matrices
            of |sum W g|, where each row or column is one vector, as in the released code.
        gradient_checkpointing: whether gradients are computed with less memory in more time; False: only where the
            memory does not suffice otherwise.
    """

    variant: Literal["element1", "element2", "mix", "vector"] = "element1"
    gradient_checkpointing: bool = False

    requires = ("gradients",)

    def score(self, channels: Channels, activation: Activation) -> Tensor:
        # Start-up time: loads torch.
        from cfsp.calibration.gradients import VARIANTS
        from cfsp.importance.coupled import coupled

        assert activation.gradients is not None
        row = VARIANTS.index(self.variant)
        return coupled(channels, {name: terms[row] for name, terms in activation.gradients.items()})
