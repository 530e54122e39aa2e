"""Optimal brain surgeon for neurons: growth of the output error when a neuron is removed and the rest refitted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from cfsp.config.components import component
from cfsp.config.contracts import NeuronImportance
from cfsp.config.deciding import Decides
from cfsp.importance.local_search import swap_units
from cfsp.importance.second_order import removal_order, scores_from_increments

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.views import AttentionView, Channels
    from cfsp.importance.base import Activation


@component
class Obs(NeuronImportance):
    """Score a channel by the error that its removal adds, in a greedy removal on the Gram matrix of the layer's input.

    Attributes:
        damping: added to the diagonal of the Gram matrix, relative to its mean.
        step: channels removed at a time; 1: exact greedy; None: 1 up to 1024 channels, beyond that N / 1024.
        first_order: whether the order of removal follows the first-order term of Tyr-the-Pruner (arXiv 2503.09657) too.
            The scores remain increments of the output error along this order.
        swaps: units that OSSCAR's local search (arXiv 2403.12983) swaps at a time, at first, once the width is known;
            0: no search.
    """

    requires = ("gram",)

    damping: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    step: Annotated[int, Field(ge=1)] | None = None
    first_order: Annotated[bool, Decides(before=False)] = False
    swaps: Annotated[int, Field(ge=0), Decides(before=0)] = 0

    @property
    def improves_kept(self) -> bool:  # type: ignore[override]
        """See :class:`cfsp.config.contracts.NeuronImportance`."""
        return self.swaps > 0

    def score(self, channels: Channels, activation: Activation) -> Tensor:
        gram = activation.gram
        assert gram is not None
        unit = _unit(channels)
        order, increments = removal_order(
            channels.output.weight.detach(),
            gram,
            damping=self.damping,
            step=1 if unit > 1 else self.step or max(1, channels.n // 1024),
            unit=unit,
            first_order=self.first_order,
        )
        return (scores_from_increments(order, increments) / unit).repeat_interleave(unit)

    def improve_kept(self, channels: Channels, activation: Activation, kept: Tensor) -> Tensor:
        """See :class:`cfsp.config.contracts.NeuronImportance`."""
        gram, weight = activation.gram, channels.output.weight.detach()
        assert gram is not None
        return swap_units(weight, gram, kept, swaps=self.swaps, damping=self.damping, unit=_unit(channels))


def _unit(channels: Channels) -> int:
    """Return the number of channels that are removed together: those of a KV group, or one neuron."""
    if channels.kind != "attention":
        return 1
    part: AttentionView = channels.part  # type: ignore[assignment]
    return channels.n // part.n_kv_heads
