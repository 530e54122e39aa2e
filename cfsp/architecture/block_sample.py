"""A sample of the values of the matrices of one block, which tells an edited model from its base."""

from __future__ import annotations

import torch
from torch import Tensor

from cfsp.architecture.experts import ExpertsFFN
from cfsp.architecture.projection import distinct
from cfsp.architecture.views import BlockView

_VALUES = 256


def block_sample(block: BlockView) -> bytes:
    """The part of one block in :func:`weight_sample`."""
    found = b""
    for matrix in _matrices(block):
        flat = matrix.detach().flatten()
        at = torch.linspace(0, flat.numel() - 1, min(_VALUES, flat.numel()), dtype=torch.float64).long()
        values = flat[at.to(flat.device)].to("cpu", torch.bfloat16)
        found += f"{tuple(matrix.shape)}".encode() + values.view(torch.int16).numpy().tobytes()
    return found


def _matrices(block: BlockView) -> list[Tensor]:
    """As they are stored, fused ones once."""
    single = [part for part in (block.ffn, block.attention) if part is not None and not isinstance(part, ExpertsFFN)]
    found: list[Tensor] = [one.parameter for one in distinct([p for part in single for p in part.projections.values()])]
    if block.experts is None:
        return found
    experts = [getattr(module, name) for module, name in block.experts.stored()]
    return [*experts, block.experts.router.weight, *found]
