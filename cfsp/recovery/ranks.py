"""LoRA ranks per block: by coarse importance, or evenly at the same number of parameters. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor


def importance_guided(importance: Sequence[float], rank: int) -> list[int]:
    """Split ranks by coarse importance: r_l = rank * s_l / mean(s), whole, at least 1; sum(r_l) = rank * L exactly.

    This is our reconstruction of arXiv 2409.13199, Eq. 9 (rank follows the normalised coarse importance), whose text
    and code are not available to us. Ranks are rounded by largest remainder; equal remainders favour the lower block.

    Args:
        importance: s_l > 0 of the blocks that are adapted.
        rank: mean rank.
    """
    count = len(importance)
    mean = sum(importance) / count
    quotas = [rank * value / mean if mean else float(rank) for value in importance]
    ranks = [max(1, floor(quota + 1e-9)) for quota in quotas]  # 1e-9: 7.999999999999999 is 8
    spare = rank * count - sum(ranks)
    while spare > 0:
        block = max(range(count), key=lambda at: (quotas[at] - ranks[at], -at))
        ranks[block] += 1
        spare -= 1
    while spare < 0:  # what the blocks lifted to 1 took from the others
        block = min((at for at in range(count) if ranks[at] > 1), key=lambda at: (quotas[at] - ranks[at], -at))
        ranks[block] -= 1
        spare += 1
    return ranks


def matched(guided: Sequence[int], costs: Sequence[int]) -> list[int]:
    """Return even ranks with the trainable parameters of ``guided``, within one rank of one block.

    Args:
        guided: the ranks to match.
        costs: parameters that one rank costs in each block, the sum of (in + out features) over its targets.

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
