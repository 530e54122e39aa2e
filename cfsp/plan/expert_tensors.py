"""Replaced tensors of the experts of a mixture in a plan: their shapes, and what a later plan leaves of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.plan.pruning_plan import BlockPlan


def expert_shape_fits(shape: tuple[int, ...], block: BlockPlan) -> bool:
    """Return whether biases [E, d] or weights [E, d, K] are of the experts and neurons that stay in a block."""
    neurons = block.expert_neurons_kept
    if neurons is None:
        return block.experts_kept is None or shape[0] == len(block.experts_kept)
    return shape[0] == len(neurons) and (len(shape) == 2 or shape[2] == len(neurons[0]))


def remaining_experts(tensor: Tensor, later: BlockPlan) -> Tensor:
    """Return biases [E, d] or weights [E, d, K] without the experts and neurons that the later plan removes."""
    # Start-up time: loads torch.
    import torch

    if later.experts_kept is not None:
        tensor = tensor[list(later.experts_kept)].contiguous()
    if later.expert_neurons_kept is None or tensor.dim() == 2:
        return tensor
    return torch.stack([own[:, list(kept)] for own, kept in zip(tensor, later.expert_neurons_kept, strict=True)])
