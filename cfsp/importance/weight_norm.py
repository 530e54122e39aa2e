"""LLM-Pruner's L1 and L2 importance of coupled groups (arXiv 2305.11627): needs no data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from cfsp.components import component

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.importance.base import Activation
    from cfsp.models.views import Channels


@component
class WeightNorm:
    """sum |W|^p over the coupled group: all weights that leave with a neuron or a KV group."""

    p: Literal[1, 2] = 1

    def score(self, channels: Channels, activation: Activation) -> Tensor:
        from cfsp.importance.coupled import coupled
        from cfsp.models.views import AttentionView

        part = channels.part
        if isinstance(part, AttentionView):
            rows = {"q": part.q_proj, "k": part.k_proj, "v": part.v_proj}
        else:
            rows = {"gate": part.gate, "up": part.up}
        terms = {name: self._sum(linear.weight, 1) for name, linear in rows.items()}
        return coupled(channels, {**terms, ("o" if "q" in rows else "down"): self._sum(channels.output.weight, 0)})

    def _sum(self, weight: Tensor, axis: int) -> Tensor:
        return weight.detach().float().abs().pow(self.p).sum(axis)
