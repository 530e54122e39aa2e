"""Hooks on the inputs of a projection, which give them as [B, T, N] whatever shape the block works in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cfsp.architecture.projection import Projection
from cfsp.architecture.views import BlockView
from cfsp.model.block_calls import input_hidden


def watch_inputs(
    block: BlockView, projection: Projection, callback: Callable[[nn.Module, tuple[Tensor, ...]], None]
) -> list[Callable[[], None]]:
    """Call ``callback`` with the input of the projection, as a forward pre-hook.

    Some families give their FFN all tokens of a batch in one row (OPT). These are folded back by the shape that entered
    the block.

    Returns:
        Functions that remove the hooks.
    """
    shape: list[int] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shape[:] = input_hidden(args, kwargs).shape[:2]

    def fold(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        callback(module, args if args[0].dim() == 3 else (args[0].unflatten(0, tuple(shape)), *args[1:]))

    return [
        block.module.register_forward_pre_hook(enter, with_kwargs=True).remove,
        projection.register_forward_pre_hook(fold).remove,
    ]
