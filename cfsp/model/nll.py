"""Negative log-likelihood of token sequences, as every evaluation and every search of cfsp measures it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

#: Largest part of a sequence's logits, in bytes of float32, whose log-softmax is computed at a time. It is several
#: passes over the logits, which take longer where they do not fit into the cache of a processor.
PART_BYTES = 2**24


def sequence_nll(logits: Tensor, ids: Tensor) -> Iterator[Tensor]:
    """Yield the summed NLL of the tokens 1..T-1 of each sequence, in nats.

    Sequences are taken one at a time, and of each no more than :data:`PART_BYTES` of logits, so that the log-softmax
    in fp32 is never held for a whole batch. Sums depend on their order in the last digits, so callers add up the
    sequences one by one.

    Args:
        logits: [B, T, V].
        ids: [B, T], on the same device.

    Yields:
        Scalars, float64 on CPU.
    """
    for sequence, target in zip(logits, ids, strict=True):
        tokens = max(1, PART_BYTES // (4 * sequence.shape[-1]))
        parts = zip(sequence[:-1].split(tokens), target[1:].split(tokens), strict=True)
        sums = [cross_entropy(part.float(), labels, reduction="sum").double() for part, labels in parts]
        yield torch.stack(sums).sum().cpu()


def total_nll(logits: Tensor, ids: Tensor) -> float:
    """Return the summed NLL of all sequences of a batch, in nats."""
    return float(sum(sequence_nll(logits, ids), torch.zeros((), dtype=torch.float64)))
