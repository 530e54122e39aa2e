"""What a search minimises: the loss of a candidate, or how far its predictions are from the dense model's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cfsp.model.nll import PART_BYTES, total_nll


class Measure(Protocol):
    """Sum over the tokens of one batch, lower for a better candidate."""

    def total(self, batch: int, logits: Tensor, ids: Tensor) -> float:
        """Return the sum in nats.

        Args:
            batch: number of the batch.
            logits: [B, T, V] of the candidate.
            ids: [B, T].
        """
        ...

    def n_tokens(self, ids: Tensor) -> int:
        """Return the number of tokens that the sum is over."""
        ...


class NLL:
    """Negative log-likelihood of the next tokens."""

    def total(self, batch: int, logits: Tensor, ids: Tensor) -> float:
        """See :class:`Measure`."""
        return total_nll(logits, ids)

    def n_tokens(self, ids: Tensor) -> int:
        """See :class:`Measure`: the first token of a sequence is not predicted."""
        return ids[:, 1:].numel()


@dataclass(frozen=True)
class _TopEntries:
    """Most probable next tokens of the dense model, of one sequence.

    Attributes:
        tokens: token ids [T, K], int32 on CPU.
        log_probabilities: of these tokens [T, K], fp32 on CPU.
    """

    tokens: Tensor
    log_probabilities: Tensor


class KLToDense:
    """Kullback-Leibler divergence of the candidate's next-token distributions from the dense model's.

    Of each dense distribution the K most probable tokens count on their own, and all others together as one. This is a
    lower bound of the full divergence. What is kept of the dense model is 8 K bytes a token.
    """

    def __init__(self, entries: int, dense_logits: Callable[[int], Tensor]) -> None:
        """Prepare the measure; the dense model runs once on each batch, when it is first asked for.

        Args:
            entries: K, cut to the size of the vocabulary.
            dense_logits: number of a batch -> logits [B, T, V] of the dense model.
        """
        self._entries, self._dense_logits = entries, dense_logits
        self._references: dict[int, list[_TopEntries]] = {}

    def total(self, batch: int, logits: Tensor, ids: Tensor) -> float:
        """See :class:`Measure`."""
        if batch not in self._references:
            self._references[batch] = [_top_entries(rows, self._entries) for rows in self._dense_logits(batch)]
        return sum(_divergence(rows, top) for rows, top in zip(logits, self._references[batch], strict=True))

    def n_tokens(self, ids: Tensor) -> int:
        """See :class:`Measure`: every token has a distribution of the next one."""
        return ids.numel()


def _rows_of_a_part(logits: Tensor) -> int:
    return max(1, PART_BYTES // (4 * logits.shape[-1]))


def _top_entries(logits: Tensor, entries: int) -> _TopEntries:
    """Return the top entries of one sequence's logits [T, V]."""
    tokens, values = [], []
    for part in logits.split(_rows_of_a_part(logits)):
        rows = part.float()
        top = rows.topk(min(entries, rows.shape[-1]), dim=-1)
        tokens.append(top.indices.int().cpu())
        values.append((top.values - rows.logsumexp(-1, keepdim=True)).cpu())
    return _TopEntries(torch.cat(tokens), torch.cat(values))


def _divergence(logits: Tensor, dense: _TopEntries) -> float:
    """Return the summed divergence of one sequence's logits [T, V] from the dense model's top entries."""
    rows = _rows_of_a_part(logits)
    total = 0.0
    parts = zip(logits.split(rows), dense.tokens.split(rows), dense.log_probabilities.split(rows), strict=True)
    for part, tokens, dense_values in parts:
        values = part.float()
        own = values.gather(-1, tokens.to(values.device).long()) - values.logsumexp(-1, keepdim=True)
        p, q = dense_values.to(values.device).double(), own.double()
        sums = (p.exp() * (p - q)).sum(-1)
        if p.shape[-1] < values.shape[-1]:
            # Sums of many float32 probabilities miss 1 by about 1e-6, so a smaller remainder is noise.
            others_p, others_q = ((1 - log.exp().sum(-1)).clamp_min(1e-6) for log in (p, q))
            sums = sums + others_p * (others_p.log() - others_q.log())
        total += float(sums.sum())
    return total
