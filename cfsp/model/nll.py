"""Negative log-likelihood of token sequences, as every evaluation and every search of cfsp measures it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def sequence_nll(logits: Tensor, ids: Tensor) -> Iterator[Tensor]:
    """Yield the summed NLL of the tokens 1..T-1 of each sequence, in nats.

    Sequences are taken one at a time, so that the log-softmax in fp32 is never held for a whole batch. Sums over
    sequences depend on their order in the last digits, so callers add them up one by one.

    Args:
        logits: [B, T, V].
        ids: [B, T], on the same device.

    Yields:
        Scalars, float64 on CPU.
    """
    for sequence, target in zip(logits, ids, strict=True):
        yield cross_entropy(sequence[:-1].float(), target[1:], reduction="sum").double().cpu()


def total_nll(logits: Tensor, ids: Tensor) -> float:
    """Return the summed NLL of all sequences of a batch, in nats."""
    return float(sum(sequence_nll(logits, ids), torch.zeros((), dtype=torch.float64)))
