"""Which experts of a mixture go as a whole: scores, how few may stay, and the best of each group of the router's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from cfsp.importance.base import Scores, distances_of
from cfsp.pruning.plan import BlockPlan

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.allocate.budget import Sizes
    from cfsp.calibrate.statistics import BlockStatistics, ExpertStatistics, Statistics
    from cfsp.models.views import BlockView, DecoderView

ExpertScore = Literal["routed_share", "contribution"]
Unseen = Literal["keep", "prune"]


def score_whole_experts(view: DecoderView, statistics: Statistics, kind: ExpertScore) -> Scores:
    """Scores with a block's experts [E] in the place of its neurons; of no length where it is no mixture.

    routed_share: the share of the calibration tokens that are routed to the expert. contribution: the mean over all
    calibration tokens of the L2 norm of routing weight * output (0 where the expert does not see the token).
    """
    import torch

    nothing = torch.zeros(0, dtype=torch.float64)
    tokens = statistics.n_sequences * statistics.seq_len

    def score_of(block: BlockView, experts: ExpertStatistics | None) -> Tensor:
        if block.experts is None or experts is None:
            return nothing
        return experts.tokens / tokens if kind == "routed_share" else experts.contribution

    scores = [score_of(block, of_block.experts) for block, of_block in _pairs(view, statistics)]
    return Scores(tuple(scores), tuple(nothing.reshape(0, 1) for _ in scores), distances_of(statistics))


def with_unseen_kept(view: DecoderView, sizes: Sizes, statistics: Statistics) -> Sizes:
    """``sizes`` where the experts that saw no token have to stay; every group of experts keeps the same number."""
    steps = list(sizes.expert_steps)
    for block, found in _pairs(view, statistics):
        mixture = block.experts
        if mixture is None or found.experts is None:
            continue
        per_group = mixture.n_experts // mixture.groups
        in_groups = [0] * mixture.groups
        for expert in found.experts.unseen:
            in_groups[expert // per_group] += 1
        least, step = steps[block.index]
        steps[block.index] = (min(mixture.n_experts, max(least, mixture.groups * max(in_groups))), step)
    return replace(sizes, expert_steps=tuple(steps))


def best_experts(block: BlockView, scores: Tensor, n: int, found: ExpertStatistics | None, unseen: Unseen) -> BlockPlan:
    """The ``n`` experts with the highest scores, as many of each group; equal scores keep the lower index."""
    mixture = block.experts
    if mixture is None or n == mixture.n_experts:
        return BlockPlan()
    ranked = scores.clone()
    if found is not None and unseen == "keep":
        ranked[found.tokens == 0] = float("inf")
    in_groups = ranked.unflatten(0, (mixture.groups, -1))
    best = in_groups.argsort(dim=1, descending=True, stable=True)[:, : n // mixture.groups]
    first = best.new_tensor(range(mixture.groups))[:, None] * in_groups.shape[1]
    return BlockPlan(experts_kept=tuple((best + first).flatten().sort().values.tolist()))


def _pairs(view: DecoderView, statistics: Statistics) -> zip[tuple[BlockView, BlockStatistics]]:
    return zip(view.blocks, statistics.blocks, strict=True)
