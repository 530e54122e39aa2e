"""The numeric check of a view: zeroing a unit must equal slicing it away, or the structure is not understood."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cfsp.architecture.ffn import FFN
from cfsp.architecture.projection import Projection
from cfsp.architecture.views import BlockView, DecoderView, view_block
from cfsp.errors import UnsupportedModelError
from cfsp.model.driver import BlockDriver, Entry, run_block
from cfsp.model.snapshot import clone_module
from cfsp.plan.slicing import slice_attention, slice_ffn
from cfsp.pruner.expert_probe import check_mixture

#: The two results differ by the order of a sum only; anything structural is of the order of the output.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_LOW_PRECISION_TOLERANCE = 5e-2

_WITHOUT_HEADS = "pruner.structure=ffn leaves the heads alone"

_Kind = Literal["ffn", "attention"]


@torch.no_grad()
def probe(view: DecoderView, *, heads: bool = False, experts: bool = False) -> None:
    """Check one block of each distinct shape. Only copies of blocks run, so that no hook on the model is called.

    Args:
        heads: check the removal of KV groups too.
        experts: check the removal of whole experts too.

    Raises:
        UnsupportedModelError: a block fails; the message names it and the deviation.
    """
    checked_shapes: set[tuple[object, ...]] = set()
    for block in view.blocks:
        _probe_block(view, block, heads, checked_shapes)
        if block.experts is not None:
            mixture = (type(block.experts.module), block.experts.n_experts, block.experts.width)
            if mixture not in checked_shapes:
                dtype = block.experts.expert(0).output.weight.dtype
                check_mixture(view, block, _TOLERANCE.get(dtype, _LOW_PRECISION_TOLERANCE), whole=experts)
            checked_shapes.add(mixture)


def _probe_block(view: DecoderView, block: BlockView, heads: bool, checked_shapes: set[tuple[object, ...]]) -> None:
    shapes: dict[_Kind, tuple[object, ...]] = {}
    ffn, attention = block.ffn, block.attention
    if isinstance(ffn, FFN):
        shapes["ffn"] = (type(ffn.module), ffn.kind, ffn.width, ffn.output.out_features)
    if heads and attention is not None and attention.n_kv_heads > 1:
        shapes["attention"] = (type(attention.module), attention.n_heads, attention.n_kv_heads)
    with ExitStack() as weights:
        for kind, shape in shapes.items():
            if (kind, *shape) not in checked_shapes:
                weights.enter_context(view.weights.resident(block))
                _judge(view, block, kind)
            checked_shapes.add((kind, *shape))


def _judge(view: DecoderView, block: BlockView, kind: _Kind) -> None:
    part = block.channels[kind].part
    submodule, unit = ("attention", "KV group") if block.ffn is not part else (f"a {block.ffn.kind} FFN", "neuron")
    name = (
        f"{type(view.model).__name__}: block {block.index} looks like {submodule} ({type(part.module).__name__}), but"
    )
    try:
        entry = BlockDriver(view, 1).entry(torch.arange(4)[None])
        deviation = max(_deviation(view, block, kind, entry, removed) for removed in ("first", "last"))
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        shapes = [
            f"{parameter_name} {tuple(parameter.shape)}"
            for parameter_name, parameter in part.module.named_parameters()
            if part.width in parameter.shape
        ]
        if unit == "neuron":
            looked = f"; looked for {', '.join(part.projections)} of its width alone"
        else:
            looked = f"; {_WITHOUT_HEADS}"
        raise UnsupportedModelError(
            f"{name} it does not run with one {unit} less{looked}, found {', '.join(shapes)}"
        ) from error
    if not deviation <= _TOLERANCE.get(part.output.parameter.dtype, _LOW_PRECISION_TOLERANCE):
        raise UnsupportedModelError(
            f"{name} removing its first or last {unit} differs from zeroing it by {deviation:.1e} of the output; its "
            f"structure is not understood{'' if unit == 'neuron' else f'; {_WITHOUT_HEADS}'}"
        )


def _deviation(view: DecoderView, block: BlockView, kind: _Kind, entry: Entry, removed: str) -> float:
    """Measure how far slicing a unit differs from zeroing it.

    Returns:
        The largest difference in the output of the output projection while a copy of the whole block runs, relative to
        its largest value.
    """
    kwargs, entering = entry.kwargs[block.index][0], entry.hidden[0]
    # Inputs of the order of one, so that the output is far above rounding whatever the scale of the embeddings.
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(entering.shape, generator=generator).to(entering.device, entering.dtype)

    def leaving(clone: BlockView, zeroed: slice | None = None) -> Tensor:
        with _Leaving(clone.channels[kind].output, zeroed) as output:
            run_block(clone, hidden, kwargs)
        return output.output

    clone = view_block(view.model, f"block {block.index}", block.index, clone_module(block.module))
    part = clone.channels[kind].part
    units = part.width if isinstance(part, FFN) else part.n_kv_heads
    size = part.width // units
    removed_unit = 0 if removed == "first" else units - 1
    zeroed = leaving(clone, slice(removed_unit * size, (removed_unit + 1) * size))
    kept = torch.tensor([unit for unit in range(units) if unit != removed_unit], device=hidden.device)
    if isinstance(part, FFN):
        slice_ffn(part, kept)
    else:
        slice_attention(part, kept)
    return float((leaving(clone) - zeroed).abs().max() / zeroed.abs().max().clamp_min(1e-30))


class _Leaving:
    """Record the output of a projection in one run of its block, with the input channels ``zeroed`` set to zero."""

    def __init__(self, output: Projection, zeroed: slice | None) -> None:
        self._outputs: list[Tensor] = []
        self._zeroed = zeroed
        self._module = output.module

    def __enter__(self) -> _Leaving:
        self._handles = [
            self._module.register_forward_pre_hook(self._zero),
            # A copy: Falcon adds the attention's output to the FFN's in place.
            self._module.register_forward_hook(lambda _, args, output: self._outputs.append(output.clone())),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def output(self) -> Tensor:
        if len(self._outputs) != 1:
            raise RuntimeError(f"the output projection runs {len(self._outputs)} times")
        return self._outputs[0]

    def _zero(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._zeroed is None:
            return args
        masked = args[0].clone()
        masked[..., self._zeroed] = 0
        return (masked, *args[1:])
