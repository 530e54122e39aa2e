"""Slicing of matrices: new, smaller ones are copied from rows and columns of the old ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cfsp.architecture.attention import AttentionView, count_heads
from cfsp.architecture.ffn import FFN
from cfsp.architecture.projection import Projection, is_transposed
from cfsp.architecture.views import Channels


def slice_linear(linear: Any, *, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Module:
    """Return a new linear (or Conv1D) with the given output rows or input columns; the old one is unchanged."""
    stored: Tensor = linear.weight.detach()
    out_axis = 1 if is_transposed(linear) else 0
    bias: Tensor | None = linear.bias
    if rows is not None:
        stored = stored.index_select(out_axis, rows)
        bias = None if bias is None else bias.detach().index_select(0, rows)
    if columns is not None:
        stored = stored.index_select(1 - out_axis, columns)
        bias = None if bias is None else bias.detach().clone()
    return _like(linear, stored, bias)


def with_bias(linear: Any, bias: Tensor) -> nn.Module:
    """Return a new linear of the same weight with ``bias`` [out] in the weight's dtype; the old one is unchanged."""
    weight: Tensor = linear.weight.detach()
    # A copy, so that later writes into the model's parameters (training) do not reach the plan's tensors.
    return _like(linear, weight, bias.to(weight.device, weight.dtype, copy=True))


def _like(like: Any, stored: Tensor, bias: Tensor | None) -> nn.Module:
    """Return a module of the same kind that holds ``stored``, in the layout in which this kind stores its matrix."""
    module_of_kind: nn.Module
    if is_transposed(like):
        with torch.device("meta"):
            module_of_kind = type(like)(stored.shape[1], stored.shape[0])
    else:
        # Falcon's linears round in another order than nn.Linear: the class stays what it is.
        cls = type(like) if type(like).__init__ is nn.Linear.__init__ else nn.Linear
        module_of_kind = cls(stored.shape[1], stored.shape[0], bias=bias is not None, device="meta", dtype=stored.dtype)
    learns = like.weight.requires_grad
    module_of_kind.weight = nn.Parameter(stored, requires_grad=learns)
    if bias is not None:
        module_of_kind.bias = nn.Parameter(bias, requires_grad=learns)
    return module_of_kind.train(like.training)


def keep_rows(kept: Sequence[tuple[Projection, Tensor]]) -> None:
    """Keep the rows with these indices of each projection, in place.

    The rows of a fused matrix, of which all projections must be there, stay in their order.
    """
    places: dict[tuple[int, str], list[tuple[Projection, Tensor]]] = {}
    for projection, units in kept:
        places.setdefault((id(projection.owner), projection.name), []).append((projection, units))
    for parts in places.values():
        first = parts[0][0]
        rows = [projection.rows_of(units) for projection, units in parts]
        setattr(first.owner, first.name, slice_linear(first.module, rows=torch.cat(rows).sort().values))


def keep_columns(projection: Projection, columns: Tensor) -> None:
    """Keep the input channels ``columns`` of a projection, in place."""
    setattr(projection.owner, projection.name, slice_linear(projection.module, columns=columns))


def slice_ffn(ffn: FFN, kept: Tensor) -> None:
    """Keep only the neurons ``kept`` (int64 indices on the weights' device) of an FFN, in place."""
    keep_rows([(projection, kept) for projection in ffn.inputs.values()])
    keep_columns(ffn.output, kept)


def slice_attention(attention: AttentionView, kept: Tensor) -> None:
    """Keep only the KV groups ``kept`` (int64 indices on the weights' device) of an attention, in place.

    A group has rows of k and v, and the rows of q and columns of o that belong to the query heads reading it. The
    number of query heads per KV head does not change.
    """
    wide = _spans(kept, attention.queries_per_group * attention.head_dim)
    narrow = _spans(kept, attention.head_dim)
    keep_rows([(attention.q_proj, wide), (attention.k_proj, narrow), (attention.v_proj, narrow)])
    keep_columns(attention.o_proj, wide)
    count_heads(attention, len(kept) * attention.queries_per_group, len(kept))


def set_output_bias(channels: Channels, bias: Tensor) -> None:
    """Give down_proj (or o_proj) the bias [d], in place."""
    output = channels.output
    setattr(output.owner, output.name, with_bias(output.module, bias))


def set_output_weight(channels: Channels, weight: Tensor) -> None:
    """Give down_proj (or o_proj), sliced already, the refitted weight [d, K], in place."""
    output = channels.output
    stored = output.parameter
    bias = None if output.bias is None else output.bias.detach()
    # A copy, so that training does not write into the plan's tensors.
    fitted = weight.to(stored.device, stored.dtype, copy=True)
    setattr(
        output.owner,
        output.name,
        _like(output.module, fitted.T.contiguous() if is_transposed(output.module) else fitted, bias),
    )


def set_input_weights(weights: Sequence[tuple[Projection, Tensor]]) -> None:
    """Give gate or up, sliced already, the refitted weights [K, d], in place; other rows of a fused matrix stay."""
    for projection, weight in weights:
        module: Any = projection.module
        stored = projection.parameter.detach().clone()
        rows = projection.rows_of(torch.arange(projection.out_features, device=stored.device))
        matrix = stored.T if is_transposed(module) else stored
        matrix[rows] = weight.to(stored.device, stored.dtype)
        bias = None if module.bias is None else module.bias.detach()
        setattr(projection.owner, projection.name, _like(module, stored, bias))


def _spans(groups: Tensor, size: int) -> Tensor:
    """Return the indices of all channels of ``groups``, each of which spans ``size`` channels."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()
