"""Measuring the loss of candidate widths: FFNs are cut and compensated in the loaded model, then restored."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cfsp.architecture.ffn import FFN
from cfsp.errors import ConfigError, DataError
from cfsp.model.driver import run_block
from cfsp.model.nll import total_nll
from cfsp.plan.pruning_plan import BlockPlan
from cfsp.plan.slice_block import slice_block
from cfsp.pruner.search import KnownLosses
from cfsp.system.memory import available

if TYPE_CHECKING:
    from cfsp.architecture.views import BlockView
    from cfsp.pruner.base import PlanContext

#: Cut FFNs that are kept for other candidates: this many per block, and this share of the device's free memory in all.
_KEPT, _SHARE_OF_MEMORY = 6, 0.25

#: The parts of an FFN: (owner, attribute, linear), or of fused experts (owner, attribute, parameter).
FFNParts = list[tuple[nn.Module, str, Any]]

Cut = Callable[["BlockView", int], tuple[BlockPlan, dict[str, Tensor]]]


class WidthLosses:
    """Mean NLL on ``input_ids`` [n, T] of the model with given FFN widths.

    The model runs from the first block with another width on. To be used inside ``with restored(model)``: the blocks
    are changed.
    """

    def __init__(self, context: PlanContext, input_ids: Tensor, cut: Cut, before: dict[str, Any]) -> None:
        """Prepare the measurement of candidate widths.

        Args:
            cut: block, width -> the decision on the block, and its compensation.
            before: everything beside widths and ids that decides the losses; the key of losses on disk.

        Raises:
            ConfigError: the model is streamed.
            DataError: windows of one token.
        """
        if context.driver.view.weights.is_streamed:
            raise ConfigError(
                "allocator=search runs the model for each candidate, which model.streaming=on would read each time; "
                "use allocator=coarse or reconstruction, or model.streaming=off"
            )
        if input_ids.shape[1] < 2:
            raise DataError("windows of one token have no next token to predict; allocator=search needs at least 2")
        self._driver, self._ids, self._cut = context.driver, input_ids, cut
        self._known = KnownLosses.of(context, input_ids, before)
        self._entry = self._driver.entry(input_ids)
        #: (block, width) -> parts of its cut FFN, the least recently used first.
        self._linears: OrderedDict[tuple[int, int], FFNParts] = OrderedDict()
        self._room = int(_SHARE_OF_MEMORY * available(context.driver.view.device))
        self._base = [self._now(block) for block in self._driver.view.blocks]
        #: Widths of the blocks up to which hidden states are held.
        self._widths: list[int | None] = []
        self._states: list[list[Tensor]] = [[state.cpu() for state in self._entry.hidden]]

    @torch.no_grad()
    def __call__(self, widths: tuple[int, ...]) -> float:
        key = [(block, f"width{width}") for block, width in enumerate(widths)]
        loss = self._known.get(key)
        if loss is None:
            start = time.perf_counter()
            loss = self._measured(widths)
            self._known.put(key, loss, time.perf_counter() - start)
        return loss

    def _measured(self, widths: tuple[int, ...]) -> float:
        view, device = self._driver.view, self._driver.view.device
        same = 0
        while same < len(self._widths) and self._widths[same] == widths[same]:
            same += 1
        del self._widths[same:], self._states[same + 1 :]
        for block in view.blocks[same:]:
            self._install(block, widths[block.index])
            try:
                outputs = [
                    run_block(block, hidden.to(device), kwargs).cpu()
                    for hidden, kwargs in zip(self._states[-1], self._entry.kwargs[block.index], strict=True)
                ]
            finally:
                self._put(block, self._base[block.index])
            self._states.append(outputs)
            self._widths.append(widths[block.index])
        total, count = 0.0, 0
        for ids, hidden in zip(self._entry.ids, self._states[-1], strict=True):
            total += total_nll(self._driver.logits(ids, hidden.to(device)), ids)
            count += ids[:, 1:].numel()
        return total / count if math.isfinite(total) else math.inf

    def _install(self, block: BlockView, width: int) -> None:

        if block.ffn is None or width == block.ffn.width:
            return
        key = (block.index, width)
        if key not in self._linears:
            decision, tensors = self._cut(block, width)
            slice_block(block, decision, tensors)
            self._linears[key] = self._now(block)
            self._room -= _bytes(self._linears[key])
        self._linears.move_to_end(key)
        while len(self._linears) > 1 and (self._room < 0 or len(self._linears) > _KEPT * len(self._base)):
            self._room += _bytes(self._linears.popitem(last=False)[1])
        self._put(block, self._linears[key])

    def _now(self, block: BlockView) -> FFNParts:
        if block.ffn is None:
            return []
        if isinstance(block.ffn, FFN):
            return _linears(block.ffn)
        stored = [(module, name, getattr(module, name)) for module, name in block.ffn.stored()]
        return stored if block.ffn.fused else [part for expert in block.ffn.each for part in _linears(expert)]

    def _put(self, block: BlockView, parts: FFNParts) -> None:
        for owner, name, held in parts:
            setattr(owner, name, held)


def _linears(ffn: FFN) -> FFNParts:
    return [(projection.owner, projection.name, projection.module) for projection in ffn.projections.values()]


def _bytes(parts: FFNParts) -> int:
    tensors = [held.parameters() if isinstance(held, nn.Module) else [held] for *_, held in parts]
    return sum(parameter.nbytes for part in tensors for parameter in part)
