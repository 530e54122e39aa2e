"""LLM-Pruner's Taylor importance of coupled groups (arXiv 2305.11627), from real gradients of the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from cfsp.components import component
from cfsp.contracts import NeuronImportance

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.importance.base import Activation
    from cfsp.models.views import Channels


@component
class Taylor(NeuronImportance):
    """element1: sum |W g|; element2: sum |W F W|; mix: sum |W g - W F W / 2|; vector: sum of |sum W g| per matrix.

    Over the coupled group: a neuron's row of gate, row of up and column of down; a KV group's rows of q, k, v and
    columns of o. g: gradient of the mean loss, F: mean squared gradient per sequence. The vector variant takes each
    row or column of a matrix as one vector, as the released code does.
    """

    variant: Literal["element1", "element2", "mix", "vector"] = "element1"
    gradient_checkpointing: bool = False

    requires = ("gradients",)

    def score(self, channels: Channels, activation: Activation) -> Tensor:
        from cfsp.calibrate.gradients import VARIANTS
        from cfsp.importance.coupled import coupled

        assert activation.gradients is not None
        row = VARIANTS.index(self.variant)
        return coupled(channels, {name: terms[row] for name, terms in activation.gradients.items()})
