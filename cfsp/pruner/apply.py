"""The apply stage: model, PruningPlan -> smaller model, by real slicing, in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from cfsp.architecture.views import BlockView, DecoderView, resolve
from cfsp.errors import CheckpointError, UnsupportedModelError
from cfsp.model.snapshot import restored
from cfsp.model.weight_sample import weight_sample
from cfsp.plan.check import check_tensors
from cfsp.plan.pruning_plan import BlockPlan, PruningPlan
from cfsp.plan.slice_block import slice_block
from cfsp.pruned_model.adopt import adopt, check_adoptable
from cfsp.pruned_model.layer_changes import remove_layers
from cfsp.pruner.submodules import remove_submodule

Model = TypeVar("Model", bound=nn.Module)


def apply(model: Model, plan: PruningPlan) -> Model:
    """Slice ``model`` in place, and give it the configuration and the class that describe its new shapes.

    Args:
        model: the plan's base model.

    Returns:
        The same model.

    Raises:
        CheckpointError: the plan does not fit: another base model, number of blocks, heads or widths.
        UnsupportedModelError: the plan removes something that cannot be removed from this architecture.
    """
    check_adoptable(model)  # type: ignore[arg-type]
    view = resolve(model)
    check_fits(view, plan)
    for block, decision in zip(view.blocks, plan.blocks, strict=True):
        slice_block(block, decision, plan.tensors)
        if decision.keeps_block:
            if not decision.attention and not block.attention_removed:
                remove_submodule(view, block, "attention")
            if not decision.ffn and block.ffn is not None:
                remove_submodule(view, block, "mlp")
    removed_blocks = [index for index, decision in enumerate(plan.blocks) if not decision.keeps_block]
    if removed_blocks:
        remove_layers(view.model, removed_blocks)
    adopt(view.model)
    view.weights.follow(resolve(view.model), plan.blocks, plan.tensors)
    return model


@contextmanager
def sliced(view: DecoderView, decisions: Sequence[BlockPlan]) -> Iterator[None]:
    """Slice the blocks of ``view`` inside ``with``, and restore them afterwards; whole blocks are never removed."""
    weights = view.weights
    with restored(view.model):
        for block, decision in zip(view.blocks, decisions, strict=True):
            slice_block(block, decision, {})
        weights.follow(view, decisions)
        try:
            yield
        finally:
            weights.follow(view, None)


def check_fits(view: DecoderView, plan: PruningPlan) -> None:
    """Refuse a plan that was not made for the model of ``view``.

    Raises:
        CheckpointError: the plan was made for another model, or its tensors are missing.
        UnsupportedModelError: the plan leaves no attention.
    """
    if len(plan.blocks) != len(view.blocks):
        raise CheckpointError(f"the plan has {len(plan.blocks)} blocks, the model {len(view.blocks)}")
    for block, decision in zip(view.blocks, plan.blocks, strict=True):
        _check_block(block, decision)
    if not any(decision.attention and not block.attention_removed for block, decision in _pairs(view, plan)):
        raise UnsupportedModelError("the plan leaves no attention in any block; such a model cannot run")
    if plan.base_sample and plan.base_sample != weight_sample(view):
        raise CheckpointError(
            f"the plan was made for {plan.base_model} ({plan.base_fingerprint[:19]}...), whose weights are not "
            "those of this model; load the plan's base model"
        )
    try:
        check_tensors(plan)
    except ValueError as error:
        raise CheckpointError(f"the plan does not fit in itself: {error}") from error
    if plan.compensation and not plan.tensors:
        raise CheckpointError(
            "the plan replaces weights or biases, but its tensors are not there; read it with PruningPlan.load, with "
            "compensation.safetensors beside plan.json"
        )


def _pairs(view: DecoderView, plan: PruningPlan) -> zip[tuple[BlockView, BlockPlan]]:
    return zip(view.blocks, plan.blocks, strict=True)


def _check_block(block: BlockView, decision: BlockPlan) -> None:
    mixture, experts, width = block.experts, block.units("experts"), block.units("neurons").n
    staying = decision.expert_neurons_kept or ()
    if staying and (mixture is None or (decision.experts_kept is None and len(staying) != experts.n)):
        raise CheckpointError(
            f"block {block.index}: the plan keeps neurons of {len(staying)} experts, the model has {experts.n}"
        )
    if mixture is not None and decision.experts_kept is not None and len(decision.experts_kept) < experts.least:
        raise UnsupportedModelError(
            f"block {block.index}: the plan keeps {len(decision.experts_kept)} experts; its router needs "
            f"{experts.least} to choose {mixture.top_k} of"
        )
    neurons = max((kept for kept in staying), key=lambda kept: kept[-1], default=None)
    for kept, unit, available in (
        (decision.ffn_kept, "neuron", width if mixture is None else 0),
        (neurons, "neuron", 0 if mixture is None else width),
        (decision.experts_kept, "expert", experts.n),
        (decision.kv_groups_kept, "KV group", block.units("kv_groups").n),
    ):
        if kept is not None and kept[-1] >= available:
            raise CheckpointError(f"block {block.index}: the plan keeps {unit} {kept[-1]}, the model has {available}")
