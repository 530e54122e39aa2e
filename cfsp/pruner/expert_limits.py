"""Limits that a plan for mixtures of experts must respect, and the notes that it must carry."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cfsp.errors import BudgetError, ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from cfsp.architecture.views import BlockView, DecoderView
    from cfsp.calibration.gram import GramRequest
    from cfsp.calibration.gram_store import GramMatrices
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


def check_mixtures(view: DecoderView, budget: Budget, structure: Structure, compensation: str) -> None:
    """Refuse what the one-shot engine cannot do to a model with mixtures, or with structure experts without any.

    Raises:
        UnsupportedModelError: there is no mixture, or the compensation refits whole FFNs.
        BudgetError: see :func:`check_expert_widths`.
    """
    name = type(view.model).__name__
    if not view.mixtures:
        raise UnsupportedModelError(
            f"{name}: pruner.structure=experts needs a mixture of experts, and no block is one; use "
            "pruner.structure=ffn"
        )
    if structure in ("ffn", "heads_ffn"):
        check_expert_widths(view, budget)
    if compensation == "gauss_newton":
        raise UnsupportedModelError(
            f"{name}: pruner.compensation=gauss_newton refits FFNs that see every token, and block "
            f"{view.mixtures[0].index} is a mixture of experts; use pruner.compensation=least_squares"
        )


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


def check_expert_settings(structure: Structure, allocator: Component[Allocator]) -> None:
    """Refuse an allocator that does not support whole experts, before calibration.

    Raises:
        ConfigError: the allocator searches over widths, but whole experts are removed.
    """
    if structure == "experts" and allocator.instance.needs_model:
        raise ConfigError(
            f"allocator._target_={allocator.target}: it searches for widths of FFNs, and pruner.structure="
            "experts removes whole experts; use allocator=coarse, uniform or global_rank"
        )


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


def few_token_notes(
    blocks: Sequence[BlockView], grams: GramMatrices | None, request: GramRequest | None
) -> dict[str, Any]:
    """Return the note on experts whose Gram matrices are of too few tokens: block -> experts; {} without any."""
    # Start-up time: loads torch.
    from cfsp.calibration.gram_store import few_token_experts

    if grams is None or request is None or "ffn" not in request.kinds:
        return {}
    lists = {str(block.index): few_token_experts(block, grams) for block in blocks if block.experts is not None}
    lists = {block: experts for block, experts in lists.items() if experts}
    return {"few_token_experts": lists} if lists else {}


def warn_of_few_tokens(notes: Mapping[str, Any], importance: NeuronImportance, compensation: str) -> None:
    """Log what became of the experts of :func:`few_token_notes`."""
    lists: dict[str, list[int]] = notes.get("few_token_experts", {})
    if not lists:
        return
    ranked = ["have their neurons ranked by weights"] if "gram" in importance.requires else []
    kept = [] if compensation == "none" else ["keep their columns without a refit"]
    log.warning(
        "%d experts of %d blocks saw too few calibration tokens (fewer than they have neurons, or none that is held "
        "out), so they %s; more calibration data may reach them",
        sum(map(len, lists.values())), len(lists), " and ".join(ranked + kept),
    )  # fmt: skip
