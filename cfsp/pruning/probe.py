"""The numeric check of a view: zeroing a unit must equal slicing it away, or the structure is not understood."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from cfsp.errors import UnsupportedModelError
from cfsp.models.driver import BlockDriver, run_block
from cfsp.models.streamed import resident
from cfsp.models.views import BlockView, DecoderView, GatedFFN, attention_of
from cfsp.pruning.slicing import slice_attention, slice_ffn

#: The two results differ by the order of a sum only; anything structural is of the order of the output.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_LOW_PRECISION_TOLERANCE = 5e-2


@torch.no_grad()
def probe(view: DecoderView, *, heads: bool = False) -> None:
    """Check one block of each distinct shape; runs copies, so no hook on the model sees a token.

    Args:
        heads: check the removal of KV groups too.

    Raises:
        UnsupportedModelError: names the block and the deviation.
    """
    seen: set[tuple[object, ...]] = set()
    for block in view.blocks:
        _probe_block(view, block, heads, seen)


def _probe_block(view: DecoderView, block: BlockView, heads: bool, seen: set[tuple[object, ...]]) -> None:
    with ExitStack() as weights:

        def judge(kind: tuple[object, ...], *args: Any) -> None:
            if kind not in seen:
                weights.enter_context(resident(view, block))
                _judge(view, block, *args)
            seen.add(kind)

        if block.ffn is not None:
            kind = ("ffn", type(block.ffn.module), block.ffn.width, block.ffn.down.out_features)
            judge(kind, "a gated FFN", block.ffn.module, "neuron", block.ffn.width, _ffn_deviation)
        attention = block.attention
        if heads and attention is not None and attention.n_kv_heads > 1:
            kind = ("attention", type(attention.module), attention.n_heads, attention.n_kv_heads)
            width = attention.o_proj.in_features
            judge(kind, "attention", attention.module, "KV group", width, _attention_deviation(view))


def _judge(
    view: DecoderView,
    block: BlockView,
    what: str,
    module: nn.Module,
    unit: str,
    width: int,
    deviation_of: Callable[[BlockView], float],
) -> None:
    name = f"{type(view.model).__name__}: block {block.index} looks like {what} ({type(module).__name__}), but"
    try:
        deviation = deviation_of(block)
    except RuntimeError as error:
        found = [
            f"{parameter_name} {tuple(parameter.shape)}"
            for parameter_name, parameter in module.named_parameters()
            if width in parameter.shape
        ]
        looked = "; looked for gate, up and down of its width alone" if unit == "neuron" else ""
        raise UnsupportedModelError(
            f"{name} it does not run with one {unit} less{looked}, found {', '.join(found)}"
        ) from error
    if not deviation <= _TOLERANCE.get(next(module.parameters()).dtype, _LOW_PRECISION_TOLERANCE):
        raise UnsupportedModelError(
            f"{name} removing its last {unit} differs from zeroing it by {deviation:.1e} of the output; its structure "
            "is not understood"
        )


def _ffn_deviation(block: BlockView) -> float:
    assert block.ffn is not None
    ffn = block.ffn
    weight = ffn.gate.weight
    view = GatedFFN(_copy(ffn.module), ffn.gate_name, ffn.up_name, ffn.down_name)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4, ffn.gate.in_features, generator=generator).to(weight.device, weight.dtype)
    removed = ffn.width - 1
    zeroed = _with_zeros(view.down, slice(removed, None), lambda: view.module(hidden))
    slice_ffn(view, torch.arange(removed, device=weight.device))
    return _deviation(zeroed, view.module(hidden))


def _attention_deviation(view: DecoderView) -> Callable[[BlockView], float]:
    def deviation(block: BlockView) -> float:
        entry = BlockDriver(view, 1).entry(torch.arange(4)[None])
        kwargs, hidden = entry.kwargs[block.index][0], entry.hidden[0]
        twin = _copy(block.module)
        attention = attention_of(view.model, twin)
        assert attention is not None
        copied = BlockView(block.index, twin, None, attention)
        span = attention.queries_per_group * attention.head_dim
        zeroed = _with_zeros(attention.o_proj, slice(-span, None), lambda: run_block(copied, hidden, kwargs))
        whole = run_block(copied, hidden, kwargs)
        slice_attention(attention, torch.arange(attention.n_kv_heads - 1, device=hidden.device))
        # Against what the attention adds: the residual stream would hide an error.
        return float((run_block(copied, hidden, kwargs) - zeroed).abs().max() / _scale(whole - hidden))

    return deviation


def _with_zeros(output: nn.Linear, channels: slice, run: Callable[[], Tensor]) -> Tensor:
    def zero(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        masked = args[0].clone()
        masked[..., channels] = 0
        return (masked, *args[1:])

    handle = output.register_forward_pre_hook(zero)
    try:
        return run()
    finally:
        handle.remove()


def _copy(module: nn.Module) -> nn.Module:
    """A copy without anybody's hooks."""
    twin = copy.deepcopy(module)
    for child in twin.modules():
        child._forward_hooks.clear()
        child._forward_pre_hooks.clear()
    return twin


def _deviation(zeroed: Tensor, sliced: Tensor) -> float:
    return float((zeroed - sliced).abs().max() / _scale(zeroed))


def _scale(values: Tensor) -> Tensor:
    return values.abs().max().clamp_min(1e-30)
