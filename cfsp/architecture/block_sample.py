"""Sample of the values of one block's matrices, which tells an edited model from its base."""

from __future__ import annotations

import torch
from torch import Tensor

from cfsp.architecture.experts import ExpertsFFN
from cfsp.architecture.projection import distinct
from cfsp.architecture.views import BlockView

_VALUES = 256


def block_sample(block: BlockView) -> bytes:
    """Return shape and up to 256 evenly spaced values, in bfloat16, of each matrix of a block.

    :func:`cfsp.model.weight_sample.weight_sample` hashes the samples of all blocks.
    """
    sample = b""
    for matrix in _matrices(block):
        flat = matrix.detach().flatten()
        at = torch.linspace(0, flat.numel() - 1, min(_VALUES, flat.numel()), dtype=torch.float64).long()
        values = flat[at.to(flat.device)].to("cpu", torch.bfloat16)
        sample += f"{tuple(matrix.shape)}".encode() + values.view(torch.int16).numpy().tobytes()
    return sample


def _matrices(block: BlockView) -> list[Tensor]:
    """Return the matrices as they are stored, fused ones once."""
    single = [part for part in (block.ffn, block.attention) if part is not None and not isinstance(part, ExpertsFFN)]
    projections = distinct([projection for part in single for projection in part.projections.values()])
    matrices: list[Tensor] = [projection.parameter for projection in projections]
    if block.experts is None:
        return matrices
    experts = [getattr(module, name) for module, name in block.experts.stored()]
    return [*experts, block.experts.router.weight, *matrices]
