"""Least-squares compensation: the kept columns of down_proj (o_proj) are refitted to the output of all columns.

With G = X^T X / tokens of the layer's inputs, K the kept and R the removed columns of W [d, N], the new columns
minimise ||X W^T - X_K W'^T||^2 / tokens + ridge * mean(diag G) * ||W' - W_K||^2, whose solution is
W' = W_K + W_R G_RK (G_KK + ridge mean(diag G) I)^-1. The columns are shrunk towards the ORIGINAL ones, so that removing
no column changes nothing, and the error on the tokens of G is never above that of the plain columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.plan.pruning_plan import BlockPlan, tensor_name
from cfsp.pruner.compensation import removed_channels

if TYPE_CHECKING:
    from cfsp.architecture.views import BlockView
    from cfsp.calibration.gram import GramMatrices

#: How often the ridge is raised tenfold where a Gram matrix is too ill-conditioned to be factored.
_TRIES = 8


def refit(weight: Tensor, gram: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """Refit the kept columns of W to the output of all columns.

    Args:
        weight: W [d, N].
        gram: G [N, N], symmetric, positive semidefinite up to rounding.
        kept: indices of K, ascending.
        ridge: >= 0, relative to the mean of G's diagonal.

    Returns:
        W' [d, K] fp64, on the device of ``gram``.
    """
    weight, gram = weight.to(gram.device, torch.float64), gram.double()
    is_removed = torch.ones(gram.shape[0], dtype=torch.bool, device=gram.device)
    is_removed[kept] = False
    removed = is_removed.nonzero().flatten()
    stay = weight.index_select(1, kept)
    # Removed channels that are dead add nothing to the right-hand side.
    if not len(removed) or not len(kept):
        return stay
    right = gram.index_select(0, kept).index_select(1, removed) @ weight.index_select(1, removed).T
    system = gram.index_select(0, kept).index_select(1, kept)
    return stay + solve(system, right, ridge * float(gram.diagonal().mean())).T


def corrected(weight: Tensor, gram: Tensor, cross: Tensor, share: float, ridge: float) -> Tensor:
    """Change W so that its output on X grows by a share of the missing output E, in the least-squares sense.

    Args:
        weight: W [d, N].
        gram: X^T X / tokens [N, N].
        cross: X^T E / tokens [N, d].
        share: share of E.
        ridge: as in :func:`refit`.

    Returns:
        The new W [d, N], fp64.
    """
    gram = gram.to(weight.device).double()
    change = solve(gram, cross.to(weight.device).double(), ridge * float(gram.diagonal().mean()))
    return weight.double() + share * change.T


def solve(system: Tensor, right: Tensor, damping: float) -> Tensor:
    """Solve (system + damping I) x = right for a positive semidefinite matrix, with more damping where that fails."""
    diagonal = system.diagonal()
    level = float(diagonal.abs().mean()) or 1.0
    added = damping
    for _ in range(_TRIES):
        damped = system.clone()
        damped.diagonal().add_(added)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            solution = torch.cholesky_solve(right, factor)
            if bool(solution.isfinite().all()):
                return solution
        added = max(10 * added, 1e-12 * level)
    return torch.zeros_like(right)  # Such a matrix has no usable information, so the columns stay unchanged.


def least_squares_compensation(
    block: BlockView, decision: BlockPlan, grams: GramMatrices, ridge: float
) -> dict[str, Tensor]:
    """Return the refitted weights of one block, by their names in the plan; empty where nothing is removed."""
    tensors = {}
    for kind, channels in block.channels.items():
        removed = removed_channels(block, decision, kind)
        if not len(removed) or len(removed) == channels.n:
            continue
        is_removed = torch.ones(channels.n, dtype=torch.bool)
        is_removed[removed] = False
        kept = is_removed.nonzero().flatten()
        weight, bias = channels.output.weight.detach(), channels.output.bias
        gram = grams.read(block.index, kind)
        matrix, mean = gram.matrix.to(weight.device), gram.mean.to(weight.device).double()
        kept_indices = kept.to(weight.device)
        if bias is None:
            fitted = refit(weight, matrix, kept_indices, ridge)
        else:  # As in FLAP, the bias restores the mean; the columns fit the deviations from it.
            fitted = refit(weight, matrix.double() - mean[:, None] * mean, kept_indices, ridge)
            lost = weight.double() @ mean - fitted @ mean[kept_indices]
            tensors[tensor_name(block.index, kind)] = (bias.detach().double() + lost).float().cpu()
        tensors[tensor_name(block.index, kind, "weight")] = fitted.to(weight.dtype).cpu().contiguous()
    return tensors
