"""The block driver: the one piece of code that runs a decoder over calibration tokens.

``whole`` runs the model as it is; ``blocks`` runs every sequence through one block before the next block starts,
which is what sequential methods (and, later, models streamed from disk) need. Hooks on the blocks see the same
tensors either way. The LM head never runs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from cfsp.models.views import BlockView, DecoderView
from cfsp.progress import progress

Mode = Literal["whole", "blocks"]


@dataclass
class BlockStep:
    """One block with the hidden states entering it, a tensor [B, T, d] per batch."""

    block: BlockView
    inputs: list[Tensor]
    _kwargs: list[dict[str, Any]]
    _outputs: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def run(self) -> list[Tensor]:
        """Run the block as it is now over all batches; the last run's outputs enter the next block."""
        self._outputs = [
            hidden_of(self.block.module(hidden, **kwargs))
            for hidden, kwargs in zip(self.inputs, self._kwargs, strict=True)
        ]
        return self._outputs


@dataclass(frozen=True)
class BlockDriver:
    """Runs the decoder of ``view`` over ids [n, T] in batches of ``batch_size`` sequences."""

    view: DecoderView
    batch_size: int
    mode: Mode = "whole"

    @torch.no_grad()
    def run(self, input_ids: Tensor) -> None:
        """Every token through every block once; results are what the caller's hooks collect."""
        if self.mode == "blocks":
            for step in self.steps(input_ids):
                step.run()
            return
        for batch in progress(self._batches(input_ids), "calibrate", unit="batch"):
            self.view.decoder(batch, use_cache=False)

    @torch.no_grad()
    def steps(self, input_ids: Tensor) -> Iterator[BlockStep]:
        """Block after block. A step that was not run is run before the next one, so no block is left out."""
        hidden, kwargs = self._entry(input_ids)
        for block in progress(self.view.blocks, "calibrate", unit="block"):
            step = BlockStep(block, hidden, kwargs[block.index])
            yield step
            hidden = step._outputs or step.run()

    def _batches(self, input_ids: Tensor) -> list[Tensor]:
        device = self.view.decoder.get_input_embeddings().weight.device
        return [batch.to(device) for batch in input_ids.split(self.batch_size)]

    def _entry(self, input_ids: Tensor) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
        """Hidden states entering the first block, and each block's keyword arguments, per batch."""
        hidden: list[Tensor] = []
        kwargs: list[list[dict[str, Any]]] = [[] for _ in self.view.blocks]
        for batch in self._batches(input_ids):
            with _blocks_skipped(self.view) as calls:
                self.view.decoder(batch, use_cache=False)
            hidden.append(calls[0][0])
            for index, (_, call_kwargs) in enumerate(calls):
                kwargs[index].append(call_kwargs)
        return hidden, kwargs


@contextmanager
def _blocks_skipped(view: DecoderView) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
    """Replace each block's forward by one that records its call and passes the hidden state on."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def recorder(*args: Any, **kwargs: Any) -> Tensor:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        calls.append((hidden, kwargs))
        return hidden

    # An instance attribute shadows the class's forward; removing it brings the class's back. Hooks are set aside:
    # the block does not run here, so nobody may count or measure this call.
    aside = [(block.module, block.module._forward_hooks, block.module._forward_pre_hooks) for block in view.blocks]
    for module, _, _ in aside:
        module.forward = recorder
        module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        yield calls
    finally:
        for module, hooks, pre_hooks in aside:
            del module.forward
            module._forward_hooks, module._forward_pre_hooks = hooks, pre_hooks


def hidden_of(output: Any) -> Tensor:
    """The hidden state in a block's output, which some families wrap in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def entering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state that a block was called with."""
    return args[0] if args else kwargs["hidden_states"]
