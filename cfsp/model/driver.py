"""Block driver, the only code that runs a decoder over calibration tokens.

:meth:`BlockDriver.run` runs the unchanged model. :meth:`BlockDriver.steps` runs every sequence through one block before
the next block starts, as sequential methods and models streamed from disk need it. Hooks on the blocks see the same
tensors either way. The LM head runs only where :meth:`BlockDriver.logits` is asked for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cfsp.architecture.views import BlockView, DecoderView
from cfsp.errors import UnsupportedModelError
from cfsp.model.block_calls import output_hidden, skip_blocks
from cfsp.model.hidden_states import HiddenStates
from cfsp.system.progress import progress


@dataclass(frozen=True)
class Entry:
    """Inputs of the blocks.

    Attributes:
        ids: token ids [B, T] of each batch.
        hidden: hidden states [B, T, d] that enter the first block, for each batch.
        kwargs: other arguments of the blocks (masks, position embeddings), [block][batch].
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
        """Run the block with its present weights over all batches.

        The caller may change the block and run it again. The outputs of the last run enter the next block.

        Args:
            each: called with the index of a batch and its output [B, T, d], before the next batch runs. Hooks still
                hold the tensors of that batch then.

        Returns:
            The outputs, [B, T, d] for each batch.
        """
        self._outputs = None  # frees the outputs of an earlier run before new ones are computed
        outputs = self.inputs.empty_like()
        for batch, (hidden, kwargs) in enumerate(zip(self.inputs, self._kwargs, strict=True)):
            output = run_block(self.block, hidden, kwargs)
            outputs.append(output)
            if each is not None:
                each(batch, output)
        self._outputs = outputs
        return outputs

    @torch.no_grad()
    def run_first_batch(self) -> Tensor:
        """Return the output [B, T, d] of the block with its present weights for the first batch."""
        return run_block(self.block, self.inputs[0], self._kwargs[0])

    @torch.no_grad()
    def run_alongside(self, states: HiddenStates) -> None:
        """Run the block with its present weights over ``states`` instead of its inputs; each output replaces its input.

        Args:
            states: hidden states [B, T, d] of each batch, changed in place.
        """
        for batch, kwargs in enumerate(self._kwargs):
            states[batch] = run_block(self.block, states[batch], kwargs)

    @torch.no_grad()
    def advance(self) -> HiddenStates:
        """Run the block for the last time and return its outputs, [B, T, d] for each batch.

        Each output replaces its input, so that only one set of hidden states is held.
        """
        for batch, kwargs in enumerate(self._kwargs):
            self.inputs[batch] = run_block(self.block, self.inputs[batch], kwargs)
        self._outputs = self.inputs
        return self.inputs


@dataclass(frozen=True)
class BlockDriver:
    """Runs a decoder over token ids in batches.

    Attributes:
        view: the decoder.
        batch_size: number of sequences in a batch.
    """

    view: DecoderView
    batch_size: int

    @torch.no_grad()
    def run(self, input_ids: Tensor, label: str = "calibrate") -> None:
        """Run every token through every block once; the caller's hooks collect the results.

        Args:
            input_ids: token ids, [n, T].
            label: text of the progress bar.
        """
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
        """Yield one step for each block, in order; a block that the caller did not run is run before the next step.

        Args:
            input_ids: [n, T], or batches [B, T] of any length.
            label: text of the progress bar.
            hidden: hidden states that enter the block ``first``; None: they are computed from ``input_ids``.
            first: index of the block to begin with.
        """
        entry = self.entry(input_ids, hidden=hidden is None)
        current, arguments = entry.hidden if hidden is None else hidden, entry.kwargs
        del entry, hidden  # otherwise the first set would stay in memory beside the current one
        for block in progress(self.view.blocks[first:], label, unit="block"):
            step = BlockStep(block, current, arguments[block.index])
            with self.view.weights.resident(block):
                yield step
                current = step._outputs or step.advance()

    def final_hidden_states(self, input_ids: Tensor | Sequence[Tensor], label: str) -> HiddenStates:
        """Run every block over all batches and return the hidden states after the last one, [B, T, d] per batch."""
        hidden = self.hidden_states()
        for step in self.steps(input_ids, label):
            hidden = step.advance()
        return hidden

    @torch.no_grad()
    def entry(self, input_ids: Tensor | Sequence[Tensor], *, hidden: bool = True) -> Entry:
        """Compute the inputs of the blocks without running any block.

        Args:
            input_ids: [n, T], or batches [B, T] of any length.
            hidden: keep the hidden states that enter the first block.

        Raises:
            UnsupportedModelError: blocks do not take hidden states [B, T, d].
        """
        entering_first = self.hidden_states()
        kwargs: list[list[dict[str, Any]]] = [[] for _ in self.view.blocks]
        batches = self._batches(input_ids)
        for batch in batches:
            with skip_blocks(self.view) as calls:
                self.view.decoder(batch, use_cache=False)
            check_hidden_states(self.view, calls[0][0], "takes")
            if hidden:
                entering_first.append(calls[0][0])
            for index, (_, call_kwargs) in enumerate(calls):
                before = kwargs[index][-1] if kwargs[index] else None
                kwargs[index].append(
                    before if before is not None and _equal_arguments(before, call_kwargs) else call_kwargs
                )
        return Entry(batches, entering_first, kwargs)

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the logits for hidden states after the last block; gradients flow through.

        Args:
            ids: token ids, [B, T].
            hidden: hidden states after the last block, [B, T, d].

        Returns:
            Logits [B, T, V].
        """
        with skip_blocks(self.view, hidden):
            return self.view.model(**self.view.weights.head_inputs(ids, hidden), use_cache=False).logits

    def hidden_states(self) -> HiddenStates:
        """Return an empty set of hidden states.

        It is held on the model's device, or within the :class:`SpillBuffer` of a streamed model.
        """
        return HiddenStates(device=self.view.device, spill=self.view.weights.spill)

    def _batches(self, input_ids: Tensor | Sequence[Tensor]) -> list[Tensor]:
        batches = input_ids.split(self.batch_size) if isinstance(input_ids, Tensor) else input_ids
        return [batch.to(self.view.device) for batch in batches]


def check_hidden_states(view: DecoderView, hidden: object, verb: str) -> None:
    """Refuse a model whose blocks do not take and give one tensor of hidden states.

    Args:
        view: the model.
        hidden: input or output of a block.
        verb: "takes" for an input, "gives" for an output; part of the message.

    Raises:
        UnsupportedModelError: ``hidden`` is no tensor [batch, tokens, hidden size].
    """
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        shape = f"{hidden.dim()} dimensions" if isinstance(hidden, Tensor) else f"the type {type(hidden).__name__}"
        raise UnsupportedModelError(
            f"{type(view.model).__name__} (model_type={view.model.config.model_type}): a block {verb} hidden states of "
            f"{shape}; models whose blocks take and give [batch, tokens, hidden size] can be pruned"
        )


def _equal_arguments(value: Any, other: Any) -> bool:
    """Return whether two arguments of a block (masks, positions) are equal, so that one copy serves both batches."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value.shape == other.shape and value.dtype == other.dtype and torch.equal(value, other)
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(_equal_arguments(value[key], other[key]) for key in value)
    if isinstance(value, tuple | list) and type(value) is type(other):
        return len(value) == len(other) and all(map(_equal_arguments, value, other))
    return bool(value is other or (isinstance(value, str | int | float | bool) and value == other))


def run_block(block: BlockView, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Run one block and return its output [B, T, d].

    Args:
        block: the block.
        hidden: hidden states that enter it, [B, T, d].
        kwargs: its other arguments, from :attr:`Entry.kwargs`.
    """
    return output_hidden(block.module(hidden, **kwargs))
