"""Calls of a decoder block: hidden states among arguments and outputs, and temporary replacement of a forward."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from cfsp.architecture.views import BlockView, DecoderView
from cfsp.model.snapshot import without_hooks


@contextmanager
def skip_blocks(view: DecoderView, leaving: Tensor | None = None) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
    """Replace the forward of each block, so that no block computes anything.

    Args:
        view: the model.
        leaving: hidden state that the replaced blocks return; None: the one that enters them.

    Yields:
        The calls so far: the hidden state that entered a block, and its other arguments by name.
    """
    calls: list[tuple[Tensor, dict[str, Any]]] = []
    modules = [block.module for block in view.blocks]

    def recorder(cls: type[nn.Module], wraps: bool) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            named = _bind_arguments(cls, args, kwargs)
            hidden = named.pop(next(iter(named)))
            calls.append((hidden, named))
            output = hidden if leaving is None else leaving
            return (output,) if wraps else output

        return record

    # The blocks do not run here, so no hook may count or measure this call.
    with without_hooks(modules), ExitStack() as shadows:
        for block in view.blocks:
            cls = type(block.module)
            shadows.enter_context(replace_forward(block.module, recorder(cls, _returns_tuple(view, block))))
        yield calls


def _bind_arguments(cls: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a block by name, with the hidden states first.

    Some families pass masks by position.
    """
    names = [name for name in inspect.signature(cls.forward).parameters if name != "self"]
    named = dict(zip(names, args, strict=False))
    if args:
        return {**named, **kwargs}
    return {"hidden_states": kwargs["hidden_states"], **kwargs}


#: Class of a block -> True if it returns a tuple whose first item is the hidden state.
_RETURNS_TUPLE: weakref.WeakKeyDictionary[type[nn.Module], bool] = weakref.WeakKeyDictionary()


class _ForwardStoppedError(Exception):
    """Ends a forward pass whose rest is not needed."""


def _returns_tuple(view: DecoderView, block: BlockView) -> bool:
    """Return whether a block wraps its output in a tuple.

    Each class is tried once with one token. The forward pass ends after the block.
    """
    cls = type(block.module)
    if cls not in _RETURNS_TUPLE:
        run = block.module.forward

        def run_and_stop(*args: Any, **kwargs: Any) -> Any:
            _RETURNS_TUPLE[cls] = isinstance(run(*args, **kwargs), tuple)
            raise _ForwardStoppedError

        before = [other.module for other in view.blocks[: block.index]]
        ids = torch.zeros(1, 1, dtype=torch.int64, device=view.device)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(view.weights.resident(block))
            # Hooks of inner modules are removed too, because no hook may count this token.
            stack.enter_context(without_hooks([*block.module.modules()]))
            stack.enter_context(replace_forward(block.module, run_and_stop))
            stack.enter_context(suppress(_ForwardStoppedError))
            for module in before:  # earlier calls have tried their classes
                stack.enter_context(without_hooks([module]))
                stack.enter_context(replace_forward(module, _identity_forward(_RETURNS_TUPLE[type(module)])))
            view.decoder(ids, use_cache=False)
    return _RETURNS_TUPLE[cls]


def _identity_forward(wraps: bool) -> Callable[..., Any]:
    """Return a forward function that returns its input hidden state, in a tuple if ``wraps`` is true."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = input_hidden(args, kwargs)
        return (hidden,) if wraps else hidden

    return forward


@contextmanager
def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of ``module`` within the context, and restore it afterwards.

    A forward that was set on the instance (accelerate does so) is restored too.
    """
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        # An instance attribute shadows the class's forward; removing it brings the class's back.
        del module.forward
        if before is not None:
            module.forward = before


def output_hidden(output: Any) -> Tensor:
    """Return the hidden state in the output of a block, which some families wrap in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def input_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden state in the arguments of a call of a block."""
    return args[0] if args else kwargs["hidden_states"]
