"""Removing units for real: new, smaller linears from rows and columns of the old ones."""

from __future__ import annotations

from torch import Tensor, nn

from cfsp.models.views import GatedFFN


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
    sliced = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    sliced.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    if bias is not None:
        sliced.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
    return sliced.train(linear.training)


def slice_ffn(ffn: GatedFFN, kept: Tensor) -> None:
    """Keep only the neurons ``kept`` (int64 indices on the weights' device) of a gated FFN, in place."""
    gate, up, down = ffn.gate, ffn.up, ffn.down
    setattr(ffn.module, ffn.gate_name, slice_linear(gate, rows=kept))
    setattr(ffn.module, ffn.up_name, slice_linear(up, rows=kept))
    setattr(ffn.module, ffn.down_name, slice_linear(down, columns=kept))


def swap_linears(ffn: GatedFFN, linears: tuple[nn.Linear, nn.Linear, nn.Linear]) -> None:
    """Put other (gate, up, down) linears into a gated FFN, e.g. the dense ones for a side-by-side timing."""
    for name, linear in zip((ffn.gate_name, ffn.up_name, ffn.down_name), linears, strict=True):
        setattr(ffn.module, name, linear)


def linears_of(ffn: GatedFFN) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """The (gate, up, down) linears that are there now."""
    return ffn.gate, ffn.up, ffn.down
