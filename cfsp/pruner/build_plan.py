"""Building the plan from the decisions on all blocks, with parameters counted on the real shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cfsp.model.weight_sample import weight_sample
from cfsp.plan.pruning_plan import BlockPlan, PruningPlan, TensorKey
from cfsp.pruner.submodules import norm_parameters, submodule_parameters

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.views import BlockView, DecoderView
    from cfsp.calibration.statistics import BlockStatistics
    from cfsp.pruner.base import PlanContext


def complete(
    context: PlanContext,
    blocks: Sequence[BlockPlan],
    *,
    keep_ratios: Sequence[float] | None = None,
    notes: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> PruningPlan:
    """Build the plan from the decisions on all blocks.

    Args:
        blocks: the decision on each block.
        keep_ratios: share of each block that an allocator asked for before rounding; None: the kept share.
        notes: facts on how the method decided.
        tensors: weights and biases that replace those of the base model; added biases count in wider scopes.
    """
    view, budget = context.driver.view, context.budget
    removed = [removed_parameters(view, block, plan) for block, plan in zip(view.blocks, blocks, strict=True)]
    removed_by_kind = {kind: sum(row[kind] for row in removed) for kind in ("ffn", "attention", "rest")}
    added = sum(_added(view, name, tensor) for name, tensor in (tensors or {}).items())
    total = sum(removed_by_kind.values())
    net = total - added
    scopes = {
        "ffn": sum(units.total for units in view.units("neurons")),
        "decoder": view.decoder_parameters,
        "model": view.model_parameters,
    }
    # The scope ffn counts only the parameters removed with the neurons. Wider scopes count all, added biases too.
    achieved = {
        "ratio": (total if budget.scope == "ffn" else net) / scopes[budget.scope],
        "removed_parameters": total,
        "added_parameters": added,
        "ffn_ratio": removed_by_kind["ffn"] / scopes["ffn"] if scopes["ffn"] else 0.0,
        "decoder_ratio": net / scopes["decoder"],
        "model_ratio": net / scopes["model"],
    }
    return PruningPlan(
        base_model=context.base_model,
        base_fingerprint=context.base_fingerprint,
        method=context.method,
        blocks=tuple(blocks),
        requested=budget.requested(),
        achieved=achieved,
        parameters={"before": view.model_parameters, "after": view.model_parameters - net},
        details=tuple(_details(context, blocks, keep_ratios)),
        base_sample=weight_sample(view),
        notes=dict(notes or {}),
        tensors=dict(tensors or {}),
    )


def removed_parameters(view: DecoderView, block: BlockView, plan: BlockPlan) -> dict[str, int]:
    """Count the parameters that ``plan`` removes from ``block``.

    Returns:
        "ffn" and "attention" with their own parameters, "rest" with those of the norms.
    """
    ffn = attention = rest = 0
    if block.ffn is not None:
        kept = _kept_width(block.ffn.width, plan)
        ffn = (block.ffn.width - kept) * block.ffn.neuron_parameters
        if block.experts is not None and plan.experts_kept is not None:
            removed_experts = block.experts.n_experts - len(plan.experts_kept)
            lost = (block.ffn.width - kept) * block.experts.expert_neuron_parameters
            ffn += removed_experts * (block.experts.expert_parameters - lost)
        if not plan.ffn:
            ffn = submodule_parameters(block, "mlp")
    if block.attention is not None and plan.kv_groups_kept is not None:
        groups = block.units("kv_groups")
        attention = (groups.n - len(plan.kv_groups_kept)) * groups.parameters
    if not plan.attention and not block.attention_removed:
        attention = submodule_parameters(block, "attention")
    if not plan.keeps_block:
        rest = sum(parameter.numel() for parameter in block.module.parameters()) - ffn - attention
    else:
        rest += norm_parameters(view, block, "mlp") if not plan.ffn and block.ffn is not None else 0
        rest += norm_parameters(view, block, "attention") if not plan.attention and not block.attention_removed else 0
    return {"ffn": ffn, "attention": attention, "rest": rest}


def _kept_width(width: int, plan: BlockPlan) -> int:
    """Return the kept neurons of the FFN, in a mixture those of each expert."""
    kept = plan.ffn_kept if plan.expert_neurons_kept is None else plan.expert_neurons_kept[0]
    return width if kept is None else len(kept)


def _added(view: DecoderView, name: str, tensor: Tensor) -> int:
    """Count the parameters that a replaced tensor adds: those of a bias that the base model lacks.

    Experts get a bias only where they have one.
    """
    key = TensorKey.parse(name)
    if key.what != "bias" or key.kind == "experts" or view.blocks[key.block].channels[key.kind].output.bias is not None:
        return 0
    return tensor.numel()


def _details(
    context: PlanContext, blocks: Sequence[BlockPlan], keep_ratios: Sequence[float] | None
) -> list[dict[str, Any]]:
    rows = []
    view, block_statistics = context.driver.view, context.statistics.blocks
    for block, plan, statistics in zip(view.blocks, blocks, block_statistics, strict=True):
        base_width, base_groups = block.units("neurons").n, block.units("kv_groups").n
        width = 0 if not plan.ffn else _kept_width(base_width, plan)
        groups = base_groups if plan.kv_groups_kept is None else len(plan.kv_groups_kept)
        share = width / base_width if base_width else 0.0
        if block.experts is not None and plan.experts_kept is not None:
            share *= len(plan.experts_kept) / block.experts.n_experts
        rows.append(
            {
                "distance": dict(statistics.distances),
                "keep_ratio": share if keep_ratios is None else float(keep_ratios[block.index]),
                "width": width,
                "base_width": base_width,
                "kv_groups": groups if plan.attention else 0,
                "base_kv_groups": base_groups,
                **_expert_details(block, plan, statistics),
            }
        )
    return rows


def _expert_details(block: BlockView, plan: BlockPlan, statistics: BlockStatistics) -> dict[str, Any]:
    """Describe a mixture: experts kept and experts before; calibration tokens and contribution of each expert."""
    if block.experts is None:
        return {}
    n = block.experts.n_experts
    kept = n if plan.experts_kept is None else len(plan.experts_kept)
    details: dict[str, Any] = {"experts": kept if plan.ffn else 0, "base_experts": n}
    if statistics.experts is not None:
        details["expert_tokens"] = [int(tokens) for tokens in statistics.experts.tokens.tolist()]
        details["expert_contribution"] = statistics.experts.contribution.tolist()
    return details
