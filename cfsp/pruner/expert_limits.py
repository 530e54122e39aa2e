"""Limits that a plan for mixtures of experts must respect, and the notes that it must carry."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cfsp.errors import BudgetError, ConfigError, UnsupportedModelError
from cfsp.importance.base import why_grams_unsupported

if TYPE_CHECKING:
    from cfsp.architecture.views import DecoderView
    from cfsp.calibration.statistics import Statistics
    from cfsp.config.budget import Budget, Structure
    from cfsp.config.components import Component
    from cfsp.config.contracts import Allocator, NeuronImportance
    from cfsp.plan.pruning_plan import BlockPlan

log = logging.getLogger(__name__)

#: transformers multiplies all experts in one grouped product by default, whose rows must be multiples of 16 bytes.
GROUPED = 8
#: Clause for notes: the neurons of experts that saw no token are ranked by their weights.
RANKED_BY_WEIGHTS = "keep the neurons with the largest weights"


def check_expert_widths(view: DecoderView, budget: Budget) -> None:
    """Refuse widths of fused experts that transformers' default implementation (grouped_mm) cannot run.

    Raises:
        BudgetError: ``round_to`` is not a multiple of 8.
    """
    fused = [block for block in view.mixtures if block.experts is not None and block.experts.fused]
    if fused and budget.round_to % GROUPED:
        raise BudgetError(
            f"sparsity.round_to={budget.round_to}: block {fused[0].index} is a mixture of experts, which transformers "
            f"runs (experts_implementation=grouped_mm) only with widths that are multiples of {GROUPED}; use "
            f"sparsity.round_to={-(-budget.round_to // GROUPED) * GROUPED}"
        )


def check_expert_settings(
    view: DecoderView,
    structure: Structure,
    importance: Component[NeuronImportance],
    allocator: Component[Allocator],
) -> None:
    """Refuse a metric or an allocator that does not support mixtures of experts, before calibration.

    Raises:
        UnsupportedModelError: the metric needs Gram matrices, which are not collected for experts.
        ConfigError: the allocator searches over widths, but whole experts are removed.
    """
    if structure == "experts" and allocator.instance.needs_model:
        raise ConfigError(
            f"allocator._target_={allocator.target}: it searches for widths of FFNs, and pruner.structure="
            "experts removes whole experts; use allocator=coarse, uniform or global_rank"
        )
    if view.mixtures and structure in ("ffn", "heads_ffn") and "gram" in importance.instance.requires:
        raise UnsupportedModelError(why_grams_unsupported(view.mixtures[0], importance.instance))


def expert_notes(
    view: DecoderView, statistics: Statistics, blocks: Sequence[BlockPlan], compensation: str, unseen: str
) -> dict[str, Any]:
    """Return and log notes on experts that saw no token and on mixtures without compensation.

    Args:
        unseen: clause for the note that says how experts that saw no token were treated.
    """
    notes: dict[str, Any] = {}
    lists = {
        str(block.index): block_statistics.experts.unseen
        for block, block_statistics in zip(view.blocks, statistics.blocks, strict=True)
        if block.experts and block_statistics.experts is not None
    }
    lists = {block: experts for block, experts in lists.items() if experts}
    if lists:
        notes["unseen_experts"] = lists
        log.warning(
            "%d experts of %d blocks saw no calibration token and %s; more calibration data may reach them",
            sum(map(len, lists.values())), len(lists), unseen,
        )  # fmt: skip
    without = [index for index, plan in enumerate(blocks) if plan.expert_neurons_kept is not None]
    if compensation == "bias" and without:
        notes["not_compensated"] = without
        log.warning(
            "pruner.compensation=bias: the FFNs of %d blocks are mixtures of experts and get no bias", len(without)
        )
    return notes
