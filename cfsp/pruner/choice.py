"""Choosing the units with the highest scores."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cfsp.plan.pruning_plan import BlockPlan
from cfsp.sparsity.budget import Widths

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.views import BlockView


def best(block: BlockView, neurons: Tensor, groups: Tensor, widths: Widths) -> BlockPlan:
    """Keep the units with the highest scores; the score of a KV group is the sum over its channels."""
    neurons_kept = best_neurons(block, neurons, widths.per_block[block.index])
    return replace(neurons_kept, kv_groups_kept=best_kv_groups(groups, widths.kv_groups[block.index]).kv_groups_kept)


def best_neurons(block: BlockView, scores: Tensor, width: int) -> BlockPlan:
    """Keep the neurons with the highest scores [N]; of a mixture, equally many neurons of each expert [E, N]."""
    if scores.dim() == 1:
        return BlockPlan(_top(scores, width))
    kept = [_top(row, width) for row in scores]
    return BlockPlan(expert_neurons_kept=None if kept[0] is None else tuple(row for row in kept if row is not None))


def best_kv_groups(scores: Tensor, count: int) -> BlockPlan:
    """Keep the KV groups with the highest sums of their channels' scores [groups, channels of a group]."""
    return BlockPlan(kv_groups_kept=_top(scores.sum(1), count))


def _top(scores: Tensor, n: int) -> tuple[int, ...] | None:
    if n == len(scores):
        return None
    # A stable sort: equal scores keep the lower index, on every machine.
    return tuple(scores.argsort(descending=True, stable=True)[:n].sort().values.tolist())
