"""Choosing the units with the highest scores, and letting the metric improve the choice at a given width."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cfsp.config.components import option_of
from cfsp.errors import RunError
from cfsp.importance.base import activation_for, read_gram
from cfsp.plan.pruning_plan import BlockPlan
from cfsp.sparsity.budget import Widths

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.views import BlockView
    from cfsp.calibration.gram_store import GramMatrices
    from cfsp.calibration.statistics import BlockStatistics
    from cfsp.pruner.base import PlanContext


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


def improve_kept_units(
    context: PlanContext,
    block: BlockView,
    decision: BlockPlan,
    statistics: BlockStatistics,
    grams: GramMatrices | None = None,
) -> BlockPlan:
    """Let the metric improve the kept units of a block, whose weights are in memory; their numbers stay.

    Args:
        context: the metric and its gradient terms.
        block: the block, dense.
        decision: units with the highest scores.
        statistics: statistics of the block.
        grams: Gram matrices of the block; None: those of the calibration pass.

    Raises:
        RunError: the metric returns another number of units, or one twice.
    """
    # Start-up time: loads torch.
    import torch

    importance, grams = context.importance, context.grams if grams is None else grams
    terms = None if context.gradients is None else context.gradients.blocks[block.index]
    for kind, kept, inputs in (
        ("ffn", decision.ffn_kept, statistics.ffn),
        ("attention", decision.kv_groups_kept, statistics.attention),
    ):
        if kept is None or inputs is None:
            continue
        channels = block.channels[kind]
        gram = read_gram(block, kind, importance, grams)
        activation = activation_for(channels, inputs, terms, gram)
        better = tuple(sorted(importance.improve_kept(channels, activation, torch.tensor(kept)).tolist()))
        if len(set(better)) != len(kept) or len(better) != len(kept):
            raise RunError(
                f"{option_of('importance', importance)}: improve_kept returns {len(set(better))} units of block "
                f"{block.index}'s {kind}, and the budget keeps {len(kept)}; return as many indices as it is given"
            )
        decision = replace(decision, ffn_kept=better) if kind == "ffn" else replace(decision, kv_groups_kept=better)
    return decision


def _top(scores: Tensor, n: int) -> tuple[int, ...] | None:
    if n == len(scores):
        return None
    # A stable sort: equal scores keep the lower index, on every machine.
    return tuple(scores.argsort(descending=True, stable=True)[:n].sort().values.tolist())
