"""Choosing whole experts of a mixture: scores, the fewest that may stay, and the best of each router group."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from cfsp.importance.base import Scores, block_distances_by_name
from cfsp.plan.pruning_plan import BlockPlan

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.views import BlockView, DecoderView
    from cfsp.calibration.statistics import BlockStatistics, ExpertStatistics, Statistics
    from cfsp.sparsity.budget import Sizes

ExpertScore = Literal["routed_share", "contribution", "reap"]
Unseen = Literal["keep", "prune"]


def score_whole_experts(view: DecoderView, statistics: Statistics, kind: ExpertScore) -> Scores:
    """Score the experts of every mixture.

    Args:
        kind: routed_share: share of the calibration tokens that are routed to the expert; contribution: mean over all
            calibration tokens of the L2 norm of routing weight * output (0 where the expert does not see the token);
            reap: mean of the same norm over the tokens that are routed to the expert, so that its share of them does
            not count (REAP, arXiv 2510.13999); 0 for an expert that saw no token.

    Returns:
        Scores whose ``neurons`` hold the experts [E] of each block; empty for a block that is not a mixture.
    """
    import torch

    nothing = torch.zeros(0, dtype=torch.float64)
    tokens = statistics.n_sequences * statistics.seq_len

    def score_of(block: BlockView, experts: ExpertStatistics | None) -> Tensor:
        if block.experts is None or experts is None:
            return nothing
        if kind == "routed_share":
            return experts.tokens / tokens
        return experts.contribution * (tokens / experts.tokens.clamp_min(1) if kind == "reap" else 1)

    scores = [score_of(block, block_statistics.experts) for block, block_statistics in _pairs(view, statistics)]
    return Scores(tuple(scores), tuple(nothing.reshape(0, 1) for _ in scores), block_distances_by_name(statistics))


def keep_unseen_experts(view: DecoderView, sizes: Sizes, statistics: Statistics) -> Sizes:
    """Raise the fewest experts in ``sizes`` so that experts that saw no token stay.

    Every group of experts keeps the same number.
    """
    steps = list(sizes.expert_steps)
    for block, block_statistics in _pairs(view, statistics):
        mixture = block.experts
        if mixture is None or block_statistics.experts is None:
            continue
        per_group = mixture.n_experts // mixture.groups
        in_groups = [0] * mixture.groups
        for expert in block_statistics.experts.unseen:
            in_groups[expert // per_group] += 1
        least, step = steps[block.index]
        steps[block.index] = (min(mixture.n_experts, max(least, mixture.groups * max(in_groups))), step)
    return replace(sizes, expert_steps=tuple(steps))


def best_experts(
    block: BlockView, scores: Tensor, n: int, statistics: ExpertStatistics | None, unseen: Unseen
) -> BlockPlan:
    """Keep the ``n`` experts with the highest scores, equally many of each router group."""
    mixture = block.experts
    if mixture is None or n == mixture.n_experts:
        return BlockPlan()
    ranked = scores.clone()
    if statistics is not None and unseen == "keep":
        ranked[statistics.tokens == 0] = float("inf")
    in_groups = ranked.unflatten(0, (mixture.groups, -1))
    best = in_groups.argsort(dim=1, descending=True, stable=True)[:, : n // mixture.groups]
    first = best.new_tensor(range(mixture.groups))[:, None] * in_groups.shape[1]
    return BlockPlan(experts_kept=tuple((best + first).flatten().sort().values.tolist()))


def _pairs(view: DecoderView, statistics: Statistics) -> zip[tuple[BlockView, BlockStatistics]]:
    return zip(view.blocks, statistics.blocks, strict=True)
