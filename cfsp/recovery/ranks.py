"""LoRA ranks of the blocks: by coarse importance, or even ranks with the same number of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor


def importance_guided_ranks(importance: Sequence[float], rank: int) -> list[int]:
    """Distribute LoRA ranks over the blocks in proportion to coarse importance: r_l = rank * s_l / mean(s).

    Ranks are integers of at least 1 and their sum is exactly rank * L. This is our reconstruction of
    arXiv 2409.13199, Eq. 9 (rank follows the normalised coarse importance), whose text and code are not available to
    us. Ranks are rounded by largest remainder; equal remainders favour the lower block.

    Args:
        importance: coarse importance s_l > 0 of each adapted block, [L].
        rank: mean rank.

    Returns:
        Rank of each adapted block, [L].
    """
    count = len(importance)
    mean = sum(importance) / count
    quotas = [rank * value / mean if mean else float(rank) for value in importance]
    ranks = [max(1, floor(quota + 1e-9)) for quota in quotas]  # 7.999999999999999 counts as 8
    spare = rank * count - sum(ranks)
    while spare > 0:
        block = max(range(count), key=lambda at: (quotas[at] - ranks[at], -at))
        ranks[block] += 1
        spare -= 1
    while spare < 0:  # blocks that were raised to rank 1 exceed the sum, so others give up ranks
        block = min((at for at in range(count) if ranks[at] > 1), key=lambda at: (quotas[at] - ranks[at], -at))
        ranks[block] -= 1
        spare += 1
    return ranks


def even_ranks(guided: Sequence[int], costs: Sequence[int]) -> list[int]:
    """Return even ranks with as many trainable parameters as ``guided``, to within one rank of one block.

    Args:
        guided: ranks whose number of parameters is matched, one for each adapted block.
        costs: parameters of one rank in each block, the sum of (in + out features) over its target layers.

    Returns:
        Ranks that differ by at most 1.
    """
    parameters = sum(rank * cost for rank, cost in zip(guided, costs, strict=True))
    base = max(1, parameters // sum(costs))
    spare = parameters - base * sum(costs)
    ranks = [base] * len(costs)
    for at, cost in enumerate(costs):
        if cost <= spare:
            ranks[at] += 1
            spare -= cost
    return ranks
