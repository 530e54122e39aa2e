"""Optimal brain surgeon for neurons: what the output error grows by when one goes and the others are refitted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from cfsp.components import component
from cfsp.contracts import NeuronImportance
from cfsp.importance.second_order import removal_order, scores_of

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.importance.base import Activation
    from cfsp.models.views import AttentionView, Channels


@component
class Obs(NeuronImportance):
    """Greedy removal on the Gram matrix of the layer's input; a score is what the channel's removal adds to the error.

    ``step``: channels that go at a time (1: exact greedy; null: 1 up to 1024 channels, beyond N / 1024 of them).
    """

    requires = ("gram",)

    damping: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    step: Annotated[int, Field(ge=1)] | None = None

    def score(self, channels: Channels, activation: Activation) -> Tensor:
        gram = activation.gram
        assert gram is not None
        unit = 1
        if channels.kind == "attention":
            part: AttentionView = channels.part  # type: ignore[assignment]
            unit = channels.n // part.n_kv_heads
        step = 1 if unit > 1 else self.step or max(1, channels.n // 1024)
        weight = channels.output.weight.detach()
        order, increments = removal_order(weight, gram, damping=self.damping, step=step, unit=unit)
        return (scores_of(order, increments) / unit).repeat_interleave(unit)
