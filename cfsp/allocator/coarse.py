"""CFSP's coarse allocation: a sigmoid of each block's distance sets its share (arXiv 2409.13199, released code)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cfsp.allocator.base import Allocation
from cfsp.config.components import component
from cfsp.config.contracts import Allocator

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.importance.base import Scores
    from cfsp.sparsity.budget import Sizes

#: The released code uses sums over 128 x 1024 tokens divided by 1e4; per token this is 13.1072, at any set size.
SCALE = 128 * 1024 / 1e4


@component
class Coarse(Allocator):
    """Keep more of the blocks that move the hidden state further.

    keep_l = (1 - p) s_l / mean(s) with s_l = sigmoid(13.1072 a (A_l - mean A)), shrunk where a block would exceed 1.

    Attributes:
        metric: block distance A; ``euclidean`` is another name of mse; ``none`` treats every block alike.
        temperature: sharpness a.
    """

    metric: Literal["angular", "cosine", "mse", "euclidean", "mae", "none"] = "angular"
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    def block_distance(self) -> str:
        return {"none": "angular", "euclidean": "mse"}.get(self.metric, self.metric)

    def block_importance(self, scores: Scores) -> Tensor:
        """Return the sigmoid s_l [L] of each block, before any shrinking; IG-LoRA sets its ranks by it."""
        if self.metric == "none":
            alike = scores.distances["angular"]
            return alike.new_full(alike.shape, 0.5)
        distance = scores.distances[self.block_distance()]
        return (SCALE * self.temperature * (distance - distance.mean())).sigmoid()

    def allocate(self, scores: Scores, sizes: Sizes, keep: float) -> Allocation:
        share = self.block_importance(scores)
        # All blocks have the same weight in a dense model.
        weight = share.new_tensor(sizes.parameters) / sizes.removable
        mean, highest = (share * weight).sum(), share.max()
        if highest / mean * keep >= 1 and highest > mean:
            share = mean + (share - mean) * (mean * (1 / keep - 1) / (highest - mean) / 1.05)
        return Allocation(keep * share / mean)
