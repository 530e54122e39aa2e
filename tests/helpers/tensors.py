"""Random tensors, rows of pairs, and closeness in double precision."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )


def rows(pairs, which: int) -> Tensor:
    return torch.cat([pair[which] for pair in pairs])
