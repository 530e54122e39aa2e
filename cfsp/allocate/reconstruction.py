"""Allocation by reconstruction error: scores say what a removal adds to it, and the cheapest go, wherever they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from cfsp.allocate.filling import filled
from cfsp.components import component
from cfsp.contracts import Allocator

if TYPE_CHECKING:
    from cfsp.allocate.base import Allocation
    from cfsp.allocate.budget import Sizes
    from cfsp.importance.base import Scores


@component
class Reconstruction(Allocator):
    """Widths that minimise the sum of the blocks' output errors, for scores that are increments of such an error.

    With ``importance=obs`` the error of a block as a function of its width is the sum of its lowest scores, which is
    convex, so taking the lowest scores of all blocks per parameter until the budget is met is the optimum.
    ``weighted``: errors count relative to how much the block moves the hidden state (mse: its squared change).
    """

    weighted: Literal["none", "mse"] = "mse"

    def allocate(self, scores: Scores, sizes: Sizes, keep: float) -> Allocation:
        import torch

        change = scores.distances["mse"] if self.weighted == "mse" else torch.ones(len(scores.neurons)).double()
        change = change.clamp_min(float(change[change > 0].min()) if bool((change > 0).any()) else 1.0)
        neurons = [s / c / cost for s, c, cost in zip(scores.neurons, change, sizes.neuron_parameters, strict=True)]
        groups = [
            s.sum(1) / c / cost for s, c, cost in zip(scores.kv_groups, change, sizes.group_parameters, strict=True)
        ]
        return filled(neurons, groups, sizes, keep)
