"""The block driver: the one piece of code that runs a decoder over calibration tokens.

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
from cfsp.model.snapshot import hooks_aside
from cfsp.model.streamed import resident, streamed
from cfsp.system.progress import progress


@dataclass(frozen=True)
class Entry:
    """What enters the first block, per batch: ids [B, T], hidden states [B, T, d], and each block's arguments.

    ``kwargs[block][batch]`` holds masks and position embeddings as the model makes them for that block.
    """

    ids: list[Tensor]
    hidden: HiddenStates
    kwargs: list[list[dict[str, Any]]]


@dataclass
class BlockStep:
    """One block with the hidden states entering it, a tensor [B, T, d] per batch."""

    block: BlockView
    inputs: HiddenStates
    _kwargs: list[dict[str, Any]]
    _outputs: HiddenStates | None = None

    @torch.no_grad()
    def run(self, each: Callable[[int, Tensor], None] | None = None) -> HiddenStates:
        """Run the block as it is now over all batches; the last run's outputs enter the next block.

        ``each`` is called with the number of a batch and its output, while hooks still hold what they saw of it.
        """
        self._outputs = None  # the last run's go first
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
        """What the block as it is now makes of the first batch."""
        return run_block(self.block, self.inputs[0], self._kwargs[0])

    @torch.no_grad()
    def beside(self, states: HiddenStates) -> None:
        """Run the block as it is now over ``states`` instead of its inputs; each output takes its input's place."""
        for batch, kwargs in enumerate(self._kwargs):
            states[batch] = run_block(self.block, states[batch], kwargs)

    @torch.no_grad()
    def advance(self) -> HiddenStates:
        """Run the block for the last time: each output takes the place of its input, so that one set is held."""
        for batch, kwargs in enumerate(self._kwargs):
            self.inputs[batch] = run_block(self.block, self.inputs[batch], kwargs)
        self._outputs = self.inputs
        return self.inputs


@dataclass(frozen=True)
class BlockDriver:
    """Runs the decoder of ``view`` over ids [n, T] in batches of ``batch_size`` sequences."""

    view: DecoderView
    batch_size: int

    @torch.no_grad()
    def run(self, input_ids: Tensor, label: str = "calibrate") -> None:
        """Every token through every block once; results are what the caller's hooks collect."""
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
        """Block after block. A step that was not run is run before the next one, so no block is left out.

        Args:
            input_ids: [n, T], or batches [B, T] of any length.
            hidden: the states that enter the block ``first``, which is the one to begin with.
        """
        entry = self.entry(input_ids, hidden=hidden is None)
        current, arguments = entry.hidden if hidden is None else hidden, entry.kwargs
        del entry, hidden  # so that one set is held, not the first one too
        for block in progress(self.view.blocks[first:], label, unit="block"):
            step = BlockStep(block, current, arguments[block.index])
            with resident(self.view, block):
                yield step
                current = step._outputs or step.advance()

    @torch.no_grad()
    def entry(self, input_ids: Tensor | Sequence[Tensor], *, hidden: bool = True) -> Entry:
        """Run what comes before the first block; the blocks are skipped. ``hidden`` False: its states are not held."""
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
        """What the model makes of ``hidden`` [B, T, d] leaving the last block: logits [B, T, V]. Keeps gradients."""
        with _blocks_skipped(self.view, hidden):
            if streamed(self.view.model) is not None:  # so that no embedding is read
                return self.view.model(inputs_embeds=hidden, use_cache=False).logits
            return self.view.model(ids, use_cache=False).logits

    def hidden_states(self) -> HiddenStates:
        """An empty set, held where this model's are: on its device, or where its weights are streamed from."""
        store = streamed(self.view.model)
        return HiddenStates(device=self.view.device, room=None if store is None else store.room)

    def _batches(self, input_ids: Tensor | Sequence[Tensor]) -> list[Tensor]:
        batches = input_ids.split(self.batch_size) if isinstance(input_ids, Tensor) else input_ids
        return [batch.to(self.view.device) for batch in batches]


def check_hidden(view: DecoderView, hidden: object, verb: str) -> None:
    """
    Raises:
        UnsupportedModelError: what a block takes or gives is not [batch, tokens, hidden size].
    """
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        shape = f"{hidden.dim()} dimensions" if isinstance(hidden, Tensor) else f"the type {type(hidden).__name__}"
        raise UnsupportedModelError(
            f"{type(view.model).__name__} (model_type={view.model.config.model_type}): a block {verb} hidden states of "
            f"{shape}; models whose blocks take and give [batch, tokens, hidden size] can be pruned"
        )


def _equal(one: Any, other: Any) -> bool:
    """Whether two batches give a block the same arguments (masks, positions), of which one copy is enough then."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and type(one) is type(other):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one is other or (isinstance(one, str | int | float | bool) and one == other))


def run_block(block: BlockView, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """One block as it is now on hidden states [B, T, d] with the arguments of :class:`Entry`."""
    return hidden_of(block.module(hidden, **kwargs))


@contextmanager
def _blocks_skipped(view: DecoderView, leaving: Tensor | None = None) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
    """Replace each block's forward by one that records its call and passes the hidden state (or ``leaving``) on."""
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

    # Hooks are set aside: the block does not run here, so nobody may count or measure this call.
    with hooks_aside(modules), ExitStack() as shadows:
        for block in view.blocks:
            cls = type(block.module)
            shadows.enter_context(forward_replaced(block.module, recorder(cls, _returns_tuple(view, block))))
        yield calls


def _by_name(cls: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a block by name, the hidden states first: some families give masks by position."""
    names = [name for name in inspect.signature(cls.forward).parameters if name != "self"]
    named = dict(zip(names, args, strict=False))
    if args:
        return {**named, **kwargs}
    return {"hidden_states": kwargs["hidden_states"], **kwargs}


#: Whether the blocks of a class return their hidden state in a tuple, whose first item their model goes on with.
_RETURNS_TUPLE: weakref.WeakKeyDictionary[type[nn.Module], bool] = weakref.WeakKeyDictionary()


class _ReturnedError(Exception):
    """Ends a forward pass whose rest is not needed."""


def _returns_tuple(view: DecoderView, block: BlockView) -> bool:
    """Seen once of each class, in a pass of one token that ends with the block."""
    cls = type(block.module)
    if cls not in _RETURNS_TUPLE:
        run = block.module.forward

        def once(*args: Any, **kwargs: Any) -> Any:
            _RETURNS_TUPLE[cls] = isinstance(run(*args, **kwargs), tuple)
            raise _ReturnedError

        before = [other.module for other in view.blocks[: block.index]]
        ids = torch.zeros(1, 1, dtype=torch.int64, device=view.device)
        with ExitStack() as aside:
            aside.enter_context(torch.no_grad())
            aside.enter_context(resident(view, block))
            # Those of the modules within too: nobody may count this token.
            aside.enter_context(hooks_aside([*block.module.modules()]))
            aside.enter_context(forward_replaced(block.module, once))
            aside.enter_context(suppress(_ReturnedError))
            for module in before:  # of classes that are known by now
                aside.enter_context(hooks_aside([module]))
                aside.enter_context(forward_replaced(module, _passing(_RETURNS_TUPLE[type(module)])))
            view.decoder(ids, use_cache=False)
    return _RETURNS_TUPLE[cls]


def _passing(wraps: bool) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = entering(args, kwargs)
        return (hidden,) if wraps else hidden

    return forward


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``module`` runs ``forward`` for a while; a forward that somebody put on the instance comes back (accelerate)."""
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
    """The hidden state in a block's output, which some families wrap in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def entering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state that a block was called with."""
    return args[0] if args else kwargs["hidden_states"]
