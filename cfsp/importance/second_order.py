"""Greedy second-order removal: the order of removal of the channels, and the output error that each adds.

Optimal brain surgeon for whole columns of a linear: with H = G + damping * mean(diag G) * I and the remaining columns W
(refitted after each removal), removing column j and refitting the rest costs ||w_j||^2 / (H^-1)_jj.

With the first-order term (Tyr-the-Pruner, arXiv 2503.09657) the next column is the one with the smallest
|b_j . w_j| + ||w_j||^2 / (2 (H^-1)_jj), where b_j is column j of B = W_dense H. An exact refit of the remaining columns
K solves W H_KK = B_K, so B never changes. The released code takes the product with its sign, the paper its absolute
value, as here. The term changes the order alone: what a removal costs remains the growth of the output error.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: The matrices are cut to the remaining channels whenever this share of them has been removed.
_COMPACT = 0.25
#: Candidates for one step, as a multiple of the number of units that are removed together.
_CANDIDATES = 4


def removal_order(
    weight: Tensor,
    gram: Tensor,
    *,
    damping: float = 1e-3,
    step: int = 1,
    unit: int = 1,
    first_order: bool = False,
) -> tuple[Tensor, Tensor]:
    """Order the units by greedy removal: each time the unit that adds least to the squared output error.

    The greedy removal is exact at ``step=1``. With more, ``step`` of the cheapest units are removed together and the
    rest is refitted once. Among the cheapest the choice is greedy too, so that one of two redundant channels stays, and
    increments take each other into account. Costs about N^3 multiplications for the inverse and its
    updates and d N^2 / 2 for the weights, in N / (step * unit) passes over the matrices.

    Args:
        weight: W [d, N].
        gram: X^T X per token [N, N].
        damping: added to the diagonal, relative to its mean.
        step: units removed at a time.
        unit: channels of a unit, which are removed together; N is a multiple of it.
        first_order: whether the order follows the first-order term too.

    Returns:
        Indices of the units in the order of removal, [N / unit] int64, and the error that each adds, per token
        and summed over the d outputs, [N / unit] fp64.

    Raises:
        ValueError: the Gram matrix is not finite.
    """
    if not bool(gram.isfinite().all()):
        raise ValueError("the Gram matrix is not finite")
    size = gram.shape[0]
    refitted = weight.to(gram.device, torch.float64).clone()
    hessian, level = damped(gram, damping)
    target = refitted @ hessian if first_order else None
    inverse = torch.cholesky_inverse(cholesky(hessian))
    del hessian
    unit_ids = torch.arange(size // unit, device=gram.device)
    is_kept = torch.ones(size // unit, dtype=torch.bool, device=gram.device)
    order: list[Tensor] = []
    increments: list[Tensor] = []
    while len(unit_ids):
        chosen = _cheapest(refitted, inverse, is_kept, step, unit, target)
        columns = (chosen[:, None] * unit + torch.arange(unit, device=gram.device)).flatten()
        block = inverse.index_select(0, columns).index_select(1, columns)
        factor = cholesky(block)
        removed = refitted.index_select(1, columns)
        # Squared norms of the columns of W_R L^-T: the cost of each after the removal of those before it.
        whitened = torch.linalg.solve_triangular(factor, removed.T, upper=False)
        increments.append(whitened.square().sum(1).reshape(len(chosen), unit).sum(1))
        order.append(unit_ids[chosen])
        rows = torch.linalg.solve_triangular(factor, inverse.index_select(0, columns), upper=False)
        refitted.addmm_(whitened.T, rows, alpha=-1)
        inverse.addmm_(rows.T, rows, alpha=-1)
        refitted.index_fill_(1, columns, 0.0)
        is_kept[chosen] = False
        if not bool(is_kept.any()):
            break
        if int(is_kept.sum()) < (1 - _COMPACT) * len(is_kept):
            kept = is_kept.nonzero().flatten()
            columns = (kept[:, None] * unit + torch.arange(unit, device=gram.device)).flatten()
            inverse = inverse.index_select(0, columns).index_select(1, columns)
            refitted, unit_ids = refitted.index_select(1, columns), unit_ids[kept]
            target = None if target is None else target.index_select(1, columns)
            is_kept = torch.ones(len(unit_ids), dtype=torch.bool, device=gram.device)
    # An input that is always zero loses nothing; its increments come from the damping alone.
    return torch.cat(order).cpu(), torch.cat(increments).cpu() * (level > 0)


def damped(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """Return the damped Gram matrix in float64, and the mean of the diagonal before damping."""
    hessian = gram.to(torch.float64, copy=True)
    level = float(hessian.diagonal().mean())
    hessian.diagonal().add_(damping * level if level > 0 else 1.0)
    return hessian, level


def _cheapest(
    refitted: Tensor, inverse: Tensor, is_kept: Tensor, step: int, unit: int, target: Tensor | None
) -> Tensor:
    """Return the indices of the ``step`` remaining units to remove next.

    Args:
        refitted: weights as refitted after the removals so far, [d, n].
        inverse: inverse of the Gram matrix of the same channels, [n, n].
        is_kept: units that are not removed yet, [n / unit] bool.
        step: most units to remove at a time.
        unit: channels of a unit.
        target: columns B of the same channels, [d, n], for the first-order term; None: without it.
    """
    costs = _costs(refitted, inverse, unit, target)
    costs[~is_kept] = torch.inf
    n = min(step, int(is_kept.sum()))
    if n > 1 and unit == 1:
        candidates = costs.topk(min(_CANDIDATES * n, int(is_kept.sum())), largest=False).indices
        return _together(refitted, inverse, candidates, n, target)
    return costs.topk(n, largest=False).indices


def scores_from_increments(order: Tensor, increments: Tensor) -> Tensor:
    """Convert increments of the error into scores that rise in the order of removal.

    Increments are not monotone. Where they fall, neighbours share their mean (the nearest rising sequence), and a ramp
    far below rounding keeps the order among equals.

    Returns:
        Scores [N] that rise along ``order``; the sum of the first k is the error of removing the first k.
    """
    rising = _isotonic(increments.clamp_min(0))
    ramp = torch.arange(len(order), dtype=torch.float64) * (1e-12 * max(float(rising[-1]), 1e-300))
    scores = torch.empty(len(order), dtype=torch.float64)
    scores[order] = rising + ramp
    return scores


def _isotonic(values: Tensor) -> Tensor:
    """Return the nearest rising sequence (pool adjacent violators)."""
    means: list[float] = []
    counts: list[int] = []
    for value in values.tolist():
        means.append(value)
        counts.append(1)
        while len(means) > 1 and means[-2] > means[-1]:
            total = counts[-2] + counts[-1]
            means[-2] = (means[-2] * counts[-2] + means[-1] * counts[-1]) / total
            counts[-2] = total
            means.pop()
            counts.pop()
    return torch.repeat_interleave(torch.tensor(means, dtype=torch.float64), torch.tensor(counts))


def _costs(refitted: Tensor, inverse: Tensor, unit: int, target: Tensor | None) -> Tensor:
    """Return the value by which each unit is removed: the error that it adds, or half of it + the first-order term."""
    added = unit_errors(refitted, diagonal_blocks(inverse, unit))
    if target is None:
        return added
    return (target * refitted).sum(0).unflatten(0, (-1, unit)).sum(1).abs() + added / 2


def diagonal_blocks(matrix: Tensor, unit: int) -> Tensor:
    """Return the blocks of the units on the diagonal, [n / unit, unit, unit], as a view of ``matrix`` [n, n]."""
    return matrix.unflatten(1, (-1, unit)).unflatten(0, (-1, unit)).diagonal(dim1=0, dim2=2).movedim(2, 0)


def unit_errors(columns: Tensor, blocks: Tensor) -> Tensor:
    """Return tr(C_g A_g^-1 C_g^T) for each unit g.

    Args:
        columns: C [d, n].
        blocks: A_g, positive definite, [n / unit, unit, unit].
    """
    unit = blocks.shape[1]
    if unit == 1:
        return columns.square().sum(0) / blocks.flatten().clamp_min(1e-300)
    costs = []
    for index, block in enumerate(blocks):
        own = columns[:, index * unit : (index + 1) * unit]
        costs.append(torch.linalg.solve_triangular(cholesky(block), own.T, upper=False).square().sum())
    return torch.stack(costs)


def _together(refitted: Tensor, inverse: Tensor, candidates: Tensor, n: int, target: Tensor | None) -> Tensor:
    """Choose ``n`` candidates greedily: each is the cheapest after the earlier ones are removed and refitted."""
    weight = refitted.index_select(1, candidates)
    block = inverse.index_select(0, candidates).index_select(1, candidates)
    target = None if target is None else target.index_select(1, candidates)
    free = torch.zeros(len(candidates), dtype=block.dtype, device=block.device)
    picked: list[Tensor] = []
    for _ in range(n):
        cheapest = (_costs(weight, block, 1, target) + free).argmin()
        picked.append(candidates[cheapest])
        free[cheapest] = torch.inf
        row = block[cheapest] / block[cheapest, cheapest].clamp_min(1e-300)
        weight = weight - weight[:, cheapest, None] * row
        block = block - block[:, cheapest, None] * row
    return torch.stack(picked)


def cholesky(matrix: Tensor) -> Tensor:
    """Return a lower Cholesky factor; the diagonal is raised until rounding errors allow one."""
    added, level = 0.0, float(matrix.diagonal().abs().mean()) or 1.0
    while True:
        lifted = (
            matrix if not added else matrix + added * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        )
        factor, failed = torch.linalg.cholesky_ex(lifted)
        if not int(failed):
            return factor
        added = max(10 * added, 1e-14 * level)
