"""Block distances: how far a block moves the hidden state (the coarse importance of CFSP).

The distances lie between x entering and y leaving a block, per token, in fp32: angular = arccos(cos) / pi with the
cosine clamped to [-1, 1]; cosine = 1 - cos; mse and mae are means over the hidden dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor


def block_distances(x: Tensor, y: Tensor) -> Tensor:
    """Sum the distances over the tokens of each sequence.

    A zero hidden state has no direction: its cosine counts as 0.

    Args:
        x: hidden states entering the block [B, T, d].
        y: hidden states leaving the block [B, T, d].

    Returns:
        Sums [B, 4] in the order angular, cosine, mse, mae; fp64.
    """
    x, y = x.float(), y.float()
    norms = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(y, dim=-1)
    dots = (x * y).sum(-1)
    cosine = torch.where(norms > 0, dots / norms, torch.zeros_like(dots)).clamp(-1, 1)
    difference = y - x
    width = x.shape[-1]
    mse = torch.linalg.vector_norm(difference, dim=-1).square() / width
    mae = torch.linalg.vector_norm(difference, ord=1, dim=-1) / width
    return torch.stack([cosine.arccos() / torch.pi, 1 - cosine, mse, mae], dim=-1).double().sum(1)
