"""Allocation by reconstruction error: removes the units of all blocks that add least to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from cfsp.allocator.filling import fill_budget
from cfsp.config.components import component
from cfsp.config.contracts import Allocator

if TYPE_CHECKING:
    from cfsp.allocator.base import Allocation
    from cfsp.importance.base import Scores
    from cfsp.sparsity.budget import Sizes


@component
class Reconstruction(Allocator):
    """Minimise the sum of the output errors of all blocks, for scores that are increments of such an error.

    With ``importance=obs`` the error of a block as a function of its width is the sum of its lowest scores, which is
    convex. So the optimum takes the lowest scores per parameter of all blocks until the budget is met.

    Attributes:
        weighted: mse: errors count relative to the squared change that the block makes to the hidden state.
    """

    weighted: Literal["none", "mse"] = "mse"

    def allocate(self, scores: Scores, sizes: Sizes, keep: float) -> Allocation:
        import torch

        change = scores.distances["mse"] if self.weighted == "mse" else torch.ones(len(scores.neurons)).double()
        positive = change[change > 0]
        # A block that changes nothing would divide by 0; it counts as the block that changes least.
        change = change.clamp_min(float(positive.min()) if len(positive) else 1.0)
        neurons = [s / c / cost for s, c, cost in zip(scores.neurons, change, sizes.neuron_parameters, strict=True)]
        groups = [
            s.sum(1) / c / cost for s, c, cost in zip(scores.kv_groups, change, sizes.group_parameters, strict=True)
        ]
        return fill_budget(neurons, groups, sizes, keep)
