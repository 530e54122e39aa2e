"""Bias compensation (FLAP, arXiv 2312.11983): the mean output of the removed channels goes to the output's bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.plan.pruning_plan import BlockPlan, tensor_name

if TYPE_CHECKING:
    from cfsp.architecture.views import BlockView, Channels
    from cfsp.calibration.statistics import BlockStatistics


def compensated_bias(channels: Channels, mean: Tensor, removed: Tensor) -> Tensor:
    """Return the new bias [d], fp32 on CPU: the old one + W[:, removed] @ mean(X[removed]).

    Args:
        mean: mean activation of the channels [N].
        removed: indices of the removed channels.
    """
    output = channels.output
    weight = output.weight.detach().index_select(1, removed.to(output.weight.device)).float()
    bias = weight @ mean[removed].to(weight.device).float()
    return (bias if output.bias is None else bias + output.bias.detach().float()).cpu()


def bias_compensation(block: BlockView, decision: BlockPlan, statistics: BlockStatistics) -> dict[str, Tensor]:
    """Return the replaced biases of one block, by their names in the plan; empty where nothing is removed."""
    tensors = {}
    for kind, channels in block.channels.items():
        inputs = statistics.ffn if kind == "ffn" else statistics.attention
        removed = removed_channels(block, decision, kind)
        if inputs is not None and len(removed):
            tensors[tensor_name(block.index, kind)] = compensated_bias(channels, inputs.mean, removed)
    return tensors


def removed_channels(block: BlockView, decision: BlockPlan, kind: str) -> Tensor:
    """Return the indices of the removed input channels of down_proj (kind ffn) or o_proj (attention)."""
    kept = decision.ffn_kept if kind == "ffn" else decision.kv_groups_kept
    if kept is None:
        return torch.zeros(0, dtype=torch.int64)
    n = block.channels[kind].n
    units = n if kind == "ffn" or block.attention is None else block.attention.n_kv_heads
    is_removed = torch.ones(units, dtype=torch.bool)
    is_removed[list(kept)] = False
    return is_removed.repeat_interleave(n // units).nonzero().flatten()
