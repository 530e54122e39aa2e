"""A pruned model imitated by masks on the whole one: what a plan removes gives zero, through hooks alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cfsp.architecture.views import resolve
from cfsp.plan.pruning_plan import PruningPlan, tensor_name
from cfsp.pruner.submodules import parts


@contextmanager
def masked(model: nn.Module, plan: PruningPlan) -> Iterator[None]:
    """``model`` gives what the pruned one must give; whole blocks that go are passed by."""
    handles: list[Any] = []
    for block, decision in zip(resolve(model).blocks, plan.blocks, strict=True):
        if not decision.keeps_block:
            handles.append(block.module.register_forward_hook(_passed_by, with_kwargs=True))
            continue
        for kind, channels in block.channels.items():
            kept = decision.ffn_kept if kind == "ffn" else decision.kv_groups_kept
            weight, bias = (plan.tensors.get(tensor_name(block.index, kind, what)) for what in ("weight", "bias"))
            assert weight is None
            if kept is not None:
                size = 1 if kind == "ffn" else channels.n // block.attention.n_kv_heads  # type: ignore[union-attr]
                mask = torch.zeros(channels.n // size)
                mask[list(kept)] = 1
                handles.append(channels.output.register_forward_pre_hook(_masks(mask.repeat_interleave(size))))
            if bias is not None:
                handles.append(channels.output.module.register_forward_hook(_biased(bias, channels.output.bias)))
        for kind, stays in (("attention", decision.attention), ("mlp", decision.ffn)):
            if not stays:
                part = getattr(block.module, parts(block, kind)[0])  # type: ignore[arg-type]
                handles.append(part.register_forward_hook(_adds_nothing(part), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _masks(mask: Tensor) -> Any:
    return lambda module, args: (args[0] * mask, *args[1:])


def _biased(bias: Tensor, own: Tensor | None) -> Any:
    return lambda module, args, output: output + (bias if own is None else bias - own)


def _adds_nothing(part: nn.Module) -> Any:
    names = [name for name in inspect.signature(type(part).forward).parameters if name != "self"]

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden = output[0] if isinstance(output, tuple) else output
        nothing = given["residual"].clone() if "residual" in given else torch.zeros_like(hidden)
        return (nothing, *output[1:]) if isinstance(output, tuple) else nothing

    return hook


def _passed_by(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
