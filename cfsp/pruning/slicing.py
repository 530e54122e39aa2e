"""Removing units for real: new, smaller linears from rows and columns of the old ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cfsp.models.views import AttentionView, Channels, GatedFFN


def slice_linear(linear: nn.Linear, *, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Linear:
    """A new linear with the given output rows or input columns; the old one is left as it is."""
    weight: Tensor = linear.weight.detach()
    bias: Tensor | None = linear.bias
    if rows is not None:
        weight = weight.index_select(0, rows)
        bias = None if bias is None else bias.detach().index_select(0, rows)
    if columns is not None:
        weight = weight.index_select(1, columns)
        bias = None if bias is None else bias.detach().clone()
    return _linear(linear, weight, bias)


def with_bias(linear: nn.Linear, bias: Tensor) -> nn.Linear:
    """A new linear of the same weight with ``bias`` [out] in the weight's dtype; the old one is left as it is."""
    weight = linear.weight.detach()
    # A copy: what is written into the model's parameters later must not reach the plan's tensors.
    return _linear(linear, weight, bias.to(weight.device, weight.dtype, copy=True))


def _linear(like: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    made.weight = nn.Parameter(weight, requires_grad=like.weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=like.weight.requires_grad)
    return made.train(like.training)


def slice_ffn(ffn: GatedFFN, kept: Tensor) -> None:
    """Keep only the neurons ``kept`` (int64 indices on the weights' device) of a gated FFN, in place."""
    gate, up, down = ffn.gate, ffn.up, ffn.down
    setattr(ffn.module, ffn.gate_name, slice_linear(gate, rows=kept))
    setattr(ffn.module, ffn.up_name, slice_linear(up, rows=kept))
    setattr(ffn.module, ffn.down_name, slice_linear(down, columns=kept))


def slice_attention(attention: AttentionView, kept: Tensor) -> None:
    """Keep only the KV groups ``kept`` (int64 indices on the weights' device) of an attention, in place.

    A group is its rows of k and v and the rows of q and columns of o of the query heads that read it, so that the
    number of query heads per KV head stays what it was.
    """
    wide = _spans(kept, attention.queries_per_group * attention.head_dim)
    narrow = _spans(kept, attention.head_dim)
    module = attention.module
    q, k, v, o = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    module.q_proj = slice_linear(q, rows=wide)
    module.k_proj = slice_linear(k, rows=narrow)
    module.v_proj = slice_linear(v, rows=narrow)
    module.o_proj = slice_linear(o, columns=wide)


def set_output_bias(channels: Channels, bias: Tensor) -> None:
    """Give down_proj (or o_proj) the bias [d], in place."""
    part = channels.part
    name = part.down_name if isinstance(part, GatedFFN) else "o_proj"
    setattr(part.module, name, with_bias(channels.output, bias))


def _spans(groups: Tensor, size: int) -> Tensor:
    """Indices of all channels of ``groups``, each of which spans ``size`` channels."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()
