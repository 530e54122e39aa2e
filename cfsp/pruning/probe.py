"""The numeric check of a view: zeroing a neuron must equal slicing it away, or the structure is not understood."""

from __future__ import annotations

import copy

import torch
from torch import nn

from cfsp.errors import UnsupportedModelError
from cfsp.models.views import DecoderView, GatedFFN
from cfsp.pruning.slicing import slice_ffn

#: The two results differ by the order of a sum only; anything structural is of the order of the output.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_LOW_PRECISION_TOLERANCE = 5e-2


@torch.no_grad()
def probe(view: DecoderView) -> None:
    """Check one block of each distinct FFN shape; runs copies, so no hook on the model sees a token.

    Raises:
        UnsupportedModelError: names the block and the deviation.
    """
    seen = set()
    for block in view.blocks:
        kind = (type(block.ffn.module), block.ffn.width, block.ffn.down.out_features)
        if kind in seen:
            continue
        seen.add(kind)
        try:
            deviation = _deviation(block.ffn)
        except RuntimeError as error:
            named = [
                f"{name} {tuple(parameter.shape)}"
                for name, parameter in block.ffn.module.named_parameters()
                if block.ffn.width in parameter.shape
            ]
            raise UnsupportedModelError(
                f"{type(view.model).__name__}: block {block.index} looks like a gated FFN "
                f"({type(block.ffn.module).__name__}), but it does not run with one neuron less; looked for gate, "
                f"up and down of its width alone, found {', '.join(named)}"
            ) from error
        if not deviation <= _TOLERANCE.get(block.ffn.down.weight.dtype, _LOW_PRECISION_TOLERANCE):
            raise UnsupportedModelError(
                f"{type(view.model).__name__}: block {block.index} looks like a gated FFN "
                f"({type(block.ffn.module).__name__}), but removing its last neuron differs from zeroing it "
                f"by {deviation:.1e} of the output; its structure is not understood"
            )


def _deviation(ffn: GatedFFN) -> float:
    removed = ffn.width - 1
    module = copy.deepcopy(ffn.module)
    for child in module.modules():
        child._forward_hooks.clear()
        child._forward_pre_hooks.clear()
    weight = ffn.gate.weight
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4, ffn.gate.in_features, generator=generator).to(weight.device, weight.dtype)
    view = GatedFFN(module, ffn.gate_name, ffn.up_name, ffn.down_name)

    def zero(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        masked = args[0].clone()
        masked[..., removed] = 0
        return (masked, *args[1:])

    handle = view.down.register_forward_pre_hook(zero)
    zeroed = module(hidden)
    handle.remove()
    slice_ffn(view, torch.arange(removed, device=weight.device))
    sliced = module(hidden)
    scale = zeroed.abs().max().clamp_min(1e-30)
    return float((zeroed - sliced).abs().max() / scale)
