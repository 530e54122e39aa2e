"""Hooks on the routing of a mixture: the tokens of each expert, and the weights of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cfsp.architecture.experts import ExpertsFFN
from cfsp.architecture.views import BlockView
from cfsp.model.block_calls import input_hidden, output_hidden, replace_forward


@dataclass(frozen=True)
class Routing:
    """The routing of one batch.

    Attributes:
        states: hidden states of all tokens of the batch [S, d].
        chosen: experts of each token [S, k].
        weights: weights of their outputs [S, k].
    """

    states: Tensor
    chosen: Tensor
    weights: Tensor

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return the indices [n] of the tokens that the expert sees, ascending, and the weights [n] of its output."""
        token, place = torch.where(self.chosen == expert)
        return token, self.weights[token, place]


def watch_routing(block: BlockView, callback: Callable[[Routing, tuple[int, int]], None]) -> list[Callable[[], None]]:
    """Call ``callback`` with the routing of each batch and its shape [B, T], before the experts run.

    A module with the matrices of all experts receives the routing as an argument. Experts that are modules receive only
    their tokens: there the mixture runs twice more, with experts that cost nothing (:func:`routing_of_modules`).

    Returns:
        Functions that remove the hooks.
    """
    mixture = block.experts
    assert mixture is not None
    shape: list[int] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shape[:] = input_hidden(args, kwargs).shape[:2]

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered_values = [*args, *kwargs.values()]
        if mixture.each:
            routing = routing_of_modules(mixture, entered_values[0].detach())
        else:
            states, chosen, weights = (value.detach() for value in entered_values[:3])
            routing = Routing(states.flatten(0, -2), chosen.flatten(0, -2), weights.flatten(0, -2))
        callback(routing, (shape[0], shape[1]))

    at = mixture.module if mixture.each else mixture.experts
    return [
        block.module.register_forward_pre_hook(enter, with_kwargs=True).remove,
        at.register_forward_pre_hook(look, with_kwargs=True).remove,
    ]


def routing_of_modules(mixture: ExpertsFFN, states: Tensor) -> Routing:
    """Find the routing of a mixture whose experts are modules.

    A mixture adds up weight * expert(token). Where expert e gives the unit vector e, the weight of a token stands at
    place e of the output, on top of the output where all experts give zeros (the shared experts).

    Args:
        states: hidden states entering the mixture [..., d].
    """
    n, hidden = mixture.n_experts, mixture.hidden
    weights = torch.zeros(states.flatten(0, -2).shape[0], n, dtype=states.dtype, device=states.device)
    without = substituted(mixture, states, [None] * n)
    for start in range(0, n, hidden):  # A unit vector has d places, so d experts are identified at a time.
        slots = range(start, min(start + hidden, n))
        outputs = substituted(mixture, states, [e - start if e in slots else None for e in range(n)])
        weights[:, slots.start : slots.stop] = (outputs - without).flatten(0, -2)[:, : len(slots)]
    k = max(1, int((weights != 0).sum(1).max()))
    largest = weights.abs().topk(k, dim=1).indices
    largest_weights = weights.gather(1, largest)
    return Routing(states.flatten(0, -2), largest.masked_fill(largest_weights == 0, -1), largest_weights)


@torch.no_grad()
def substituted(mixture: ExpertsFFN, states: Tensor, units: Sequence[int | None]) -> Tensor:
    """Run the mixture with experts that give a unit vector, or (None) zeros, for every token.

    Returns:
        Its output [..., d].
    """

    def giving(unit: int | None) -> Callable[..., Tensor]:
        def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
            output = torch.zeros_like(x)
            if unit is not None:
                output[..., unit] = 1
            return output

        return forward

    with ExitStack() as stack:
        if mixture.each:
            for expert, unit in zip(mixture.each, units, strict=True):
                stack.enter_context(replace_forward(expert.module, giving(unit)))
        else:
            stack.enter_context(replace_forward(mixture.experts, giving(None)))
        return output_hidden(mixture.module.forward(states))
