"""Tensors of a streamed model in the order of its checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cfsp.architecture.views import BlockView, resolve
from cfsp.model.streamed import streamed


def state_tensors(model: Any) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Yield name, shape and dtype of each tensor in a streamed model's checkpoint, tied ones once, blocks in order."""
    seen: set[int] = set()
    tied = set(model._tied_weights_keys or ())
    parameters = sorted(model.named_parameters(remove_duplicate=False), key=lambda item: item[0] in tied)
    for name, parameter in parameters:
        if id(parameter) not in seen:
            yield name, tuple(parameter.shape), parameter.dtype
        seen.add(id(parameter))


def values(
    model: Any, names: Sequence[str], visit: Callable[[BlockView], None] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of tensors; each block is read once.

    Args:
        model: a streamed model.
        names: names in the checkpoint; those of a block stand together.
        visit: called with each block while its weights are in memory.
    """
    store = streamed(model)
    assert store is not None
    view = resolve(model)
    prefixes = {
        f"{name}.": block for name, module in model.named_modules() for block in view.blocks if block.module is module
    }
    current: tuple[str, Mapping[str, Tensor]] | None = None
    for name in names:
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            yield name, store.outside_blocks(name)
            continue
        if current is None or current[0] != prefix:
            current = None
            block = prefixes[prefix]
            with store.resident(block):
                if visit is not None:
                    visit(block)
                current = (prefix, {path: parameter.detach() for path, parameter in block.module.named_parameters()})
        yield name, current[1][name.removeprefix(prefix)]
