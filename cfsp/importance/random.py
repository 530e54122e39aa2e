"""Random scores: the control that every metric must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsp.components import component

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.models.views import BlockView


@component
class RandomImportance:
    """Uniform scores from ``seed`` and the block's index, drawn on CPU so that no device changes them."""

    seed: int = 0

    def score(self, block: BlockView, activation: Tensor) -> Tensor:
        import torch

        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + block.index)
        return torch.rand(block.ffn.width, generator=generator)
