"""The block driver: the only code that runs a decoder over calibration tokens.

:meth:`BlockDriver.run` runs the model as it is. :meth:`BlockDriver.steps` runs every sequence through one block before
the next block starts, as sequential methods and models streamed from disk need it. Hooks on the blocks see the same
tensors either way. The LM head runs only where :meth:`BlockDriver.logits` is asked for it.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cfsp.architecture.views import BlockView, DecoderView
from cfsp.errors import UnsupportedModelError
from cfsp.model.hidden_states import HiddenStates
from cfsp.model.snapshot import without_hooks
from cfsp.system.progress import progress


@dataclass(frozen=True)
class Entry:
    """Inputs of the blocks.

    Attributes:
        ids: token ids [B, T] of each batch.
        hidden: hidden states [B, T, d] that enter the first block, for each batch.
        kwargs: further arguments of the blocks (masks, position embeddings), [block][batch].
    """

    ids: list[Tensor]
    hidden: HiddenStates
    kwargs: list[list[dict[str, Any]]]


@dataclass
class BlockStep:
    """One block with the hidden states that enter it.

    Attributes:
        block: the block.
        inputs: hidden states, [B, T, d] for each batch.
    """

    block: BlockView
    inputs: HiddenStates
    _kwargs: list[dict[str, Any]]
    _outputs: HiddenStates | None = None

    @torch.no_grad()
    def run(self, each: Callable[[int, Tensor], None] | None = None) -> HiddenStates:
        """Run the block as it is now over all batches; the outputs of the last run enter the next block.

        Args:
            each: called with the number of a batch and its output, while hooks still hold the tensors of that batch.

        Returns:
            The outputs, [B, T, d] for each batch.
        """
        self._outputs = None  # frees those of an earlier run first
        outputs = self.inputs.like()
        for batch, (hidden, kwargs) in enumerate(zip(self.inputs, self._kwargs, strict=True)):
            output = run_block(self.block, hidden, kwargs)
            outputs.append(output)
            if each is not None:
                each(batch, output)
        self._outputs = outputs
        return outputs

    @torch.no_grad()
    def first(self) -> Tensor:
        """Return the output of the block as it is now for the first batch."""
        return run_block(self.block, self.inputs[0], self._kwargs[0])

    @torch.no_grad()
    def run_alongside(self, states: HiddenStates) -> None:
        """Run the block as it is now over other hidden states than its inputs; each output replaces its input."""
        for batch, kwargs in enumerate(self._kwargs):
            states[batch] = run_block(self.block, states[batch], kwargs)

    @torch.no_grad()
    def advance(self) -> HiddenStates:
        """Run the block for the last time; each output replaces its input, so that only one set is held."""
        for batch, kwargs in enumerate(self._kwargs):
            self.inputs[batch] = run_block(self.block, self.inputs[batch], kwargs)
        self._outputs = self.inputs
        return self.inputs


@dataclass(frozen=True)
class BlockDriver:
    """Runs a decoder over token ids in batches.

    Attributes:
        view: the decoder.
        batch_size: sequences of a batch.
    """

    view: DecoderView
    batch_size: int

    @torch.no_grad()
    def run(self, input_ids: Tensor, label: str = "calibrate") -> None:
        """Run every token through every block once; the results are what the caller's hooks collect."""
        for batch in progress(self._batches(input_ids), label, unit="batch"):
            self.view.decoder(batch, use_cache=False)

    @torch.no_grad()
    def steps(
        self,
        input_ids: Tensor | Sequence[Tensor],
        label: str = "calibrate",
        *,
        hidden: HiddenStates | None = None,
        first: int = 0,
    ) -> Iterator[BlockStep]:
        """Yield block after block. A step that the caller did not run is run before the next one.

        Args:
            input_ids: [n, T], or batches [B, T] of any length.
            label: text of the progress bar.
            hidden: states that enter the block ``first``; None: computed from ``input_ids``.
            first: index of the block to begin with.
        """
        entry = self.entry(input_ids, hidden=hidden is None)
        current, arguments = entry.hidden if hidden is None else hidden, entry.kwargs
        del entry, hidden  # so that the first set is not held beside the current one
        for block in progress(self.view.blocks[first:], label, unit="block"):
            step = BlockStep(block, current, arguments[block.index])
            with self.view.weights.resident(block):
                yield step
                current = step._outputs or step.advance()

    def leaving(self, input_ids: Tensor | Sequence[Tensor], label: str) -> HiddenStates:
        """Run every block over all batches, and return the hidden states that leave the last one, [B, T, d] each."""
        hidden = self.hidden_states()
        for step in self.steps(input_ids, label):
            hidden = step.advance()
        return hidden

    @torch.no_grad()
    def entry(self, input_ids: Tensor | Sequence[Tensor], *, hidden: bool = True) -> Entry:
        """Run the model up to the first block, and skip the blocks.

        Args:
            input_ids: [n, T], or batches [B, T] of any length.
            hidden: hold the states that enter the first block.

        Raises:
            UnsupportedModelError: blocks do not take hidden states [B, T, d].
        """
        entering_first = self.hidden_states()
        kwargs: list[list[dict[str, Any]]] = [[] for _ in self.view.blocks]
        batches = self._batches(input_ids)
        for batch in batches:
            with _blocks_skipped(self.view) as calls:
                self.view.decoder(batch, use_cache=False)
            check_hidden(self.view, calls[0][0], "takes")
            if hidden:
                entering_first.append(calls[0][0])
            for index, (_, call_kwargs) in enumerate(calls):
                before = kwargs[index][-1] if kwargs[index] else None
                kwargs[index].append(before if before is not None and _equal(before, call_kwargs) else call_kwargs)
        return Entry(batches, entering_first, kwargs)

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the logits for hidden states that leave the last block, with gradients.

        Args:
            ids: [B, T].
            hidden: [B, T, d].

        Returns:
            Logits [B, T, V].
        """
        with _blocks_skipped(self.view, hidden):
            return self.view.model(**self.view.weights.head_inputs(ids, hidden), use_cache=False).logits

    def hidden_states(self) -> HiddenStates:
        """Return an empty set, held on the model's device, or for a streamed model within its :class:`SpillBuffer`."""
        return HiddenStates(device=self.view.device, spill=self.view.weights.spill)

    def _batches(self, input_ids: Tensor | Sequence[Tensor]) -> list[Tensor]:
        batches = input_ids.split(self.batch_size) if isinstance(input_ids, Tensor) else input_ids
        return [batch.to(self.view.device) for batch in batches]


def check_hidden(view: DecoderView, hidden: object, verb: str) -> None:
    """Refuse models whose blocks do not take and give one tensor of hidden states.

    Args:
        view: the model.
        hidden: what a block took or gave.
        verb: takes or gives, for the message.

    Raises:
        UnsupportedModelError: ``hidden`` is no tensor [batch, tokens, hidden size].
    """
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        shape = f"{hidden.dim()} dimensions" if isinstance(hidden, Tensor) else f"the type {type(hidden).__name__}"
        raise UnsupportedModelError(
            f"{type(view.model).__name__} (model_type={view.model.config.model_type}): a block {verb} hidden states of "
            f"{shape}; models whose blocks take and give [batch, tokens, hidden size] can be pruned"
        )


def _equal(value: Any, other: Any) -> bool:
    """Return whether two batches give a block the same arguments (masks, positions), so that one copy is enough."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value.shape == other.shape and value.dtype == other.dtype and torch.equal(value, other)
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(_equal(value[key], other[key]) for key in value)
    if isinstance(value, tuple | list) and type(value) is type(other):
        return len(value) == len(other) and all(map(_equal, value, other))
    return bool(value is other or (isinstance(value, str | int | float | bool) and value == other))


def run_block(block: BlockView, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Run one block as it is now on hidden states [B, T, d], with the arguments of :class:`Entry`."""
    return hidden_of(block.module(hidden, **kwargs))


@contextmanager
def _blocks_skipped(view: DecoderView, leaving: Tensor | None = None) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
    """Replace each block's forward by one that records the call and returns the hidden state, or ``leaving``."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []
    modules = [block.module for block in view.blocks]

    def recorder(cls: type[nn.Module], wraps: bool) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            named = _by_name(cls, args, kwargs)
            hidden = named.pop(next(iter(named)))
            calls.append((hidden, named))
            output = hidden if leaving is None else leaving
            return (output,) if wraps else output

        return record

    # Hooks are removed meanwhile: the block does not run here, so none may count or measure this call.
    with without_hooks(modules), ExitStack() as shadows:
        for block in view.blocks:
            cls = type(block.module)
            shadows.enter_context(forward_replaced(block.module, recorder(cls, _returns_tuple(view, block))))
        yield calls


def _by_name(cls: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a block by name, hidden states first; some families pass masks by position."""
    names = [name for name in inspect.signature(cls.forward).parameters if name != "self"]
    named = dict(zip(names, args, strict=False))
    if args:
        return {**named, **kwargs}
    return {"hidden_states": kwargs["hidden_states"], **kwargs}


#: Class of a block -> whether it returns its hidden state in a tuple, whose first item the model goes on with.
_RETURNS_TUPLE: weakref.WeakKeyDictionary[type[nn.Module], bool] = weakref.WeakKeyDictionary()


class _ReturnedError(Exception):
    """Ends a forward pass whose rest is not needed."""


def _returns_tuple(view: DecoderView, block: BlockView) -> bool:
    """Return whether a block returns a tuple.

    Each class is tried once, in a pass of one token that ends with the block.
    """
    cls = type(block.module)
    if cls not in _RETURNS_TUPLE:
        run = block.module.forward

        def once(*args: Any, **kwargs: Any) -> Any:
            _RETURNS_TUPLE[cls] = isinstance(run(*args, **kwargs), tuple)
            raise _ReturnedError

        before = [other.module for other in view.blocks[: block.index]]
        ids = torch.zeros(1, 1, dtype=torch.int64, device=view.device)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(view.weights.resident(block))
            # The hooks of inner modules go too: none may count this token.
            stack.enter_context(without_hooks([*block.module.modules()]))
            stack.enter_context(forward_replaced(block.module, once))
            stack.enter_context(suppress(_ReturnedError))
            for module in before:  # their classes are known by now
                stack.enter_context(without_hooks([module]))
                stack.enter_context(forward_replaced(module, _identity_forward(_RETURNS_TUPLE[type(module)])))
            view.decoder(ids, use_cache=False)
    return _RETURNS_TUPLE[cls]


def _identity_forward(wraps: bool) -> Callable[..., Any]:
    """Return a forward that returns the hidden state that enters; ``wraps``: in a tuple."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = entering(args, kwargs)
        return (hidden,) if wraps else hidden

    return forward


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of ``module`` inside; a forward on the instance (from accelerate) comes back afterwards."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        # An instance attribute shadows the class's forward; removing it brings the class's back.
        del module.forward
        if before is not None:
            module.forward = before


def hidden_of(output: Any) -> Tensor:
    """Return the hidden state in a block's output, which some families wrap in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def entering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden state that a block was called with."""
    return args[0] if args else kwargs["hidden_states"]
