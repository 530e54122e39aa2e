"""Slicing of one block by its part of a plan."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cfsp.architecture.ffn import FFN, ffn_of
from cfsp.architecture.views import BlockView
from cfsp.plan.expert_slicing import set_expert_outputs, slice_mixture
from cfsp.plan.pruning_plan import BlockPlan, tensor_name
from cfsp.plan.slicing import set_input_weights, set_output_bias, set_output_weight, slice_attention, slice_ffn


def slice_block(block: BlockView, decision: BlockPlan, tensors: Mapping[str, Tensor]) -> None:
    """Slice the neurons, experts and KV groups of one block in place, then put the replaced tensors in.

    Args:
        block: the block as it is in the base model.
        decision: the units that stay.
        tensors: the plan's replaced tensors by name (:class:`~cfsp.plan.pruning_plan.TensorKey`).
    """
    if decision.ffn_kept is not None and decision.ffn and isinstance(block.ffn, FFN):
        slice_ffn(block.ffn, torch.tensor(decision.ffn_kept, device=block.ffn.output.parameter.device))
    if block.experts is not None and decision.ffn:
        slice_mixture(block.experts, decision.experts_kept, decision.expert_neurons_kept)
        weights, biases = (tensors.get(tensor_name(block.index, "experts", what)) for what in ("weight", "bias"))
        staying = range(block.experts.n_experts) if decision.experts_kept is None else decision.experts_kept
        set_expert_outputs(block.experts, staying, weights, biases)
    if decision.kv_groups_kept is not None and decision.attention and block.attention is not None:
        slice_attention(
            block.attention, torch.tensor(decision.kv_groups_kept, device=block.attention.output.parameter.device)
        )
    if isinstance(block.ffn, FFN) and decision.ffn:
        sliced = ffn_of(block.ffn.module)  # the rows of fused matrices have moved
        refitted = {name: tensors.get(tensor_name(block.index, "ffn", f"{name}_weight")) for name in block.ffn.inputs}
        if sliced is not None:
            set_input_weights(
                [(sliced.inputs[name], weight) for name, weight in refitted.items() if weight is not None]
            )
    for kind, channels in block.channels.items():
        weight, bias = (tensors.get(tensor_name(block.index, kind, what)) for what in ("weight", "bias"))
        if weight is not None:
            set_output_weight(channels, weight)
        if bias is not None:
            set_output_bias(channels, bias)
