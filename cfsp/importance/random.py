"""Random scores: the control experiment, which every metric must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsp.config.components import component
from cfsp.config.contracts import NeuronImportance

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.views import Channels
    from cfsp.importance.base import Activation


#: Offset of the seed between experts, larger than any block index, so that experts are drawn independently.
_EXPERT = 10_007
#: Offset of the seed for heads, unlike that of any block, so that heads and neurons are drawn independently.
_ATTENTION = 500_009


@component
class RandomImportance(NeuronImportance):
    """Draw uniform scores from ``seed`` and the block's index, on CPU so that no device changes them."""

    seed: int = 0

    def score(self, channels: Channels, activation: Activation) -> Tensor:
        import torch

        offset = channels.block + (_ATTENTION if channels.kind == "attention" else 0)
        if channels.expert is not None:
            offset += (channels.expert + 1) * _EXPERT
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + offset)
        return torch.rand(channels.n, generator=generator)
