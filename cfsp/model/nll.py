"""Negative log-likelihood of token sequences, as every evaluation and every search of cfsp measures it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

#: Most bytes of float32 logits whose log-softmax is computed at a time. The log-softmax passes over the logits several
#: times, which is slower where they do not fit into the cache of the processor.
PART_BYTES = 2**24


def sequence_nll(logits: Tensor, ids: Tensor) -> Iterator[Tensor]:
    """Yield the summed NLL of the tokens 1..T-1 of each sequence, in nats.

    At most :data:`PART_BYTES` of the logits of one sequence are processed at a time, so that the fp32 log-softmax of a
    whole batch is never in memory. The last digits of a sum depend on its order, so callers add the sequences one by
    one.

    Args:
        logits: logits, [B, T, V].
        ids: token ids, [B, T], on the same device.

    Yields:
        Scalars, float64 on CPU.
    """
    for sequence, target in zip(logits, ids, strict=True):
        tokens = max(1, PART_BYTES // (4 * sequence.shape[-1]))
        parts = zip(sequence[:-1].split(tokens), target[1:].split(tokens), strict=True)
        sums = [cross_entropy(part.float(), labels, reduction="sum").double() for part, labels in parts]
        yield torch.stack(sums).sum().cpu()


def total_nll(logits: Tensor, ids: Tensor) -> float:
    """Return the summed NLL of all sequences of a batch, in nats.

    Args:
        logits: logits, [B, T, V].
        ids: token ids, [B, T], on the same device.
    """
    return float(sum(sequence_nll(logits, ids), torch.zeros((), dtype=torch.float64)))
