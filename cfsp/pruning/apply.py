"""The apply stage: model, PruningPlan -> smaller model, by real slicing, in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from cfsp.errors import CheckpointError, UnsupportedModelError
from cfsp.models.ffn import FFN, ffn_of
from cfsp.models.layer_changes import remove_layers
from cfsp.models.remote_code import adopt, check_adoptable
from cfsp.models.sample import weight_sample
from cfsp.models.snapshot import restored
from cfsp.models.streamed import streamed
from cfsp.models.submodules import remove_submodule
from cfsp.models.views import BlockView, DecoderView, resolve
from cfsp.pruning.expert_slicing import slice_mixture
from cfsp.pruning.plan import BlockPlan, PruningPlan, tensor_name
from cfsp.pruning.plan_check import check_tensors
from cfsp.pruning.slicing import set_input_weights, set_output_bias, set_output_weight, slice_attention, slice_ffn

Model = TypeVar("Model", bound=nn.Module)


def apply(model: Model, plan: PruningPlan) -> Model:
    """Slice ``model`` in place; its configuration and class follow.

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
    gone = [index for index, decision in enumerate(plan.blocks) if not decision.keeps_block]
    if gone:
        remove_layers(view.model, gone)
    adopt(view.model)
    store = streamed(view.model)
    if store is not None:
        store.follow(resolve(view.model), plan.blocks, plan.tensors)
    return model


def slice_block(block: BlockView, decision: BlockPlan, tensors: Mapping[str, Tensor]) -> None:
    """Slice the neurons, experts and KV groups of one block in place, then put replaced ``tensors`` in."""
    if decision.ffn_kept is not None and decision.ffn and isinstance(block.ffn, FFN):
        slice_ffn(block.ffn, torch.tensor(decision.ffn_kept, device=block.ffn.output.parameter.device))
    if block.experts is not None and decision.ffn:
        slice_mixture(block.experts, decision.experts_kept, decision.expert_neurons_kept)
    if decision.kv_groups_kept is not None and decision.attention and block.attention is not None:
        slice_attention(
            block.attention, torch.tensor(decision.kv_groups_kept, device=block.attention.output.parameter.device)
        )
    if isinstance(block.ffn, FFN) and decision.ffn:
        now = ffn_of(block.ffn.module)  # the rows of fused matrices have moved
        refitted = {name: tensors.get(tensor_name(block.index, "ffn", f"{name}_weight")) for name in block.ffn.inputs}
        if now is not None:
            set_input_weights([(now.inputs[name], weight) for name, weight in refitted.items() if weight is not None])
    for kind, channels in block.channels.items():
        weight, bias = (tensors.get(tensor_name(block.index, kind, what)) for what in ("weight", "bias"))
        if weight is not None:
            set_output_weight(channels, weight)
        if bias is not None:
            set_output_bias(channels, bias)


@contextmanager
def sliced(view: DecoderView, decisions: Sequence[BlockPlan]) -> Iterator[None]:
    """Slice the blocks of ``view`` for a while; no block goes as a whole."""
    store = streamed(view.model)
    with restored(view.model):
        for block, decision in zip(view.blocks, decisions, strict=True):
            slice_block(block, decision, {})
        if store is not None:
            store.follow(view, decisions)
        try:
            yield
        finally:
            if store is not None:
                store.follow(view, None)


def check_fits(view: DecoderView, plan: PruningPlan) -> None:
    """Refuse a plan that was not made for the model of ``view``.

    Raises:
        CheckpointError: another model, or the plan's tensors are not there.
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
    experts = block.experts
    dense = block.ffn.width if isinstance(block.ffn, FFN) else 0
    staying = decision.expert_neurons_kept or ()
    if staying and (experts is None or (decision.experts_kept is None and len(staying) != experts.n_experts)):
        raise CheckpointError(
            f"block {block.index}: the plan keeps neurons of {len(staying)} experts, the model has "
            f"{0 if experts is None else experts.n_experts}"
        )
    if experts is not None and decision.experts_kept is not None and len(decision.experts_kept) < experts.least_experts:
        raise UnsupportedModelError(
            f"block {block.index}: the plan keeps {len(decision.experts_kept)} experts; its router needs "
            f"{experts.least_experts} to choose {experts.top_k} of"
        )
    neurons = max((kept for kept in staying), key=lambda kept: kept[-1], default=None)
    for kept, what, there in (
        (decision.ffn_kept, "neuron", dense),
        (neurons, "neuron", 0 if experts is None else experts.width),
        (decision.experts_kept, "expert", 0 if experts is None else experts.n_experts),
        (decision.kv_groups_kept, "KV group", block.attention.n_kv_heads if block.attention is not None else 0),
    ):
        if kept is not None and kept[-1] >= there:
            raise CheckpointError(f"block {block.index}: the plan keeps {what} {kept[-1]}, the model has {there}")
