"""Least-squares compensation: the kept columns of down_proj (o_proj) are refitted to the output of all columns.

With G = X^T X / tokens of the layer's inputs, K the kept and R the removed columns of W [d, N], the new columns
minimise ||X W^T - X_K W'^T||^2 / tokens + ridge * mean(diag G) * ||W' - W_K||^2, whose solution is
W' = W_K + W_R G_RK (G_KK + ridge mean(diag G) I)^-1. The columns are shrunk towards the ORIGINAL ones, so that a
removal of nothing changes nothing, and the error on the tokens of G is never above that of the plain columns. With
ridge=auto the strength is chosen for each projection by tokens that are held out (:mod:`cfsp.pruner.ridge_path`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from cfsp.plan.pruning_plan import BlockPlan, tensor_name
from cfsp.pruner.compensation import removed_channels
from cfsp.pruner.ridge_path import NormalEquations, choose_ridge

if TYPE_CHECKING:
    from cfsp.architecture.views import BlockView
    from cfsp.calibration.gram import Gram
    from cfsp.calibration.gram_store import GramMatrices

#: Strength of the pull towards the original columns; auto: chosen by tokens that are held out.
Ridge = float | Literal["auto"]
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
    stay = weight.index_select(1, kept)
    if len(kept) in (0, gram.shape[0]):
        return stay
    equations = _equations(weight, gram, kept)
    return stay + solve(equations.system, equations.right, ridge * float(gram.diagonal().mean())).T


def chosen_ridge(weight: Tensor, gram: Gram, kept: Tensor, *, centred: bool) -> float | None:
    """Choose the ridge of :func:`refit` by the tokens that are held out.

    Args:
        weight: W [d, N].
        gram: moments with those of the tokens that are held out.
        kept: indices of K, ascending.
        centred: whether a bias carries the mean, so that the columns fit what varies around it.

    Returns:
        The ridge; None where the columns should stay as they are.
    """
    fitted, held_out = gram.fitted(), gram.held_out
    assert held_out is not None
    matrices = [part.matrix.to(weight.device).double() for part in (fitted, held_out)]
    if centred:  # the bias is that of the fitted tokens, so held-out moments are around the fitted mean too
        mean, other = (part.mean.to(weight.device).double() for part in (fitted, held_out))
        matrices[0] = matrices[0] - torch.outer(mean, mean)
        matrices[1] = matrices[1] - torch.outer(other, mean) - torch.outer(mean, other) + torch.outer(mean, mean)
    equations = [_equations(weight, matrix, kept) for matrix in matrices]
    ridge, _ = choose_ridge(equations[0], equations[1], float(matrices[0].diagonal().mean()))
    return ridge


def _equations(weight: Tensor, gram: Tensor, kept: Tensor) -> NormalEquations:
    """Return the normal equations of the change of the kept columns."""
    is_removed = torch.ones(gram.shape[0], dtype=torch.bool, device=gram.device)
    is_removed[kept] = False
    rows, removed = gram.index_select(0, kept), is_removed.nonzero().flatten()
    right = rows.index_select(1, removed) @ weight.double().index_select(1, removed).T
    return NormalEquations(rows.index_select(1, kept), right)


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


def chosen_correction_ridge(gram: Gram, cross: tuple[Tensor, Tensor]) -> float | None:
    """Choose the ridge of :func:`corrected`; None where the weights should stay as they are.

    Args:
        gram: moments with those of the tokens that are held out.
        cross: X^T E / tokens [N, d] of the tokens to fit to, and of those that are held out.
    """
    assert gram.held_out is not None
    systems = [part.matrix.to(cross[0].device).double() for part in (gram.fitted(), gram.held_out)]
    equations = [NormalEquations(system, right.double()) for system, right in zip(systems, cross, strict=True)]
    return choose_ridge(equations[0], equations[1], float(systems[0].diagonal().mean()))[0]


def refit_output(
    weight: Tensor, bias: Tensor | None, gram: Gram, kept: Tensor, ridge: float | None, *, fitted_alone: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Refit the kept columns of an output projection, and its bias where it has one.

    Args:
        weight: W [d, N].
        bias: b [d].
        gram: moments of its inputs.
        kept: indices of K, ascending, on the device of ``weight``.
        ridge: strength; None: the columns stay as they are, and the bias alone makes up for the mean.
        fitted_alone: leave out the tokens that are held out.

    Returns:
        The kept columns [d, K], and the bias [d]; fp64.
    """
    part = gram.fitted() if fitted_alone else gram
    matrix, mean = part.matrix.to(weight.device), part.mean.to(weight.device).double()
    if bias is not None:  # the mean is the bias's to give back, as in FLAP; columns fit what varies around it
        matrix = matrix.double() - mean[:, None] * mean
    if ridge is None:
        fitted = weight.double().index_select(1, kept)
    else:
        fitted = refit(weight, matrix, kept, ridge)
    if bias is None:
        return fitted, None
    lost = weight.double() @ mean - fitted @ mean[kept]
    return fitted, bias.detach().double() + lost


def least_squares_compensation(
    block: BlockView,
    decision: BlockPlan,
    grams: GramMatrices,
    ridge: Ridge,
    chosen: dict[str, Any] | None = None,
    *,
    reuse: bool = False,
    fitted_alone: bool = False,
) -> dict[str, Tensor]:
    """Return the refitted weights of one block, by their names in the plan; empty where nothing is removed.

    Args:
        block: the block, dense.
        decision: units of it that stay.
        grams: Gram matrices of the model.
        ridge: strength, or auto.
        chosen: takes note of the ridges that auto has chosen: kind -> block -> ridge, None for no change.
        reuse: take a ridge that ``chosen`` notes already, of this decision or of another one on the same block.
        fitted_alone: fit to the tokens that are not held out, so that the others can judge what starts from here.
    """
    tensors = {}
    for kind, channels in block.channels.items():
        removed = removed_channels(block, decision, kind)
        if not len(removed) or len(removed) == channels.n:
            continue
        is_removed = torch.ones(channels.n, dtype=torch.bool)
        is_removed[removed] = False
        kept = is_removed.nonzero().flatten()
        weight, bias = channels.output.weight.detach(), channels.output.bias
        gram, kept_indices = grams.read(block.index, kind), kept.to(weight.device)
        strength: float | None
        if ridge == "auto" and reuse and chosen is not None and str(block.index) in chosen.get(kind, {}):
            strength = chosen[kind][str(block.index)]
        elif ridge == "auto":
            strength = chosen_ridge(weight, gram, kept_indices, centred=bias is not None)
            if chosen is not None:
                chosen.setdefault(kind, {})[str(block.index)] = strength
        else:
            strength = ridge
        fitted, bias = refit_output(weight, bias, gram, kept_indices, strength, fitted_alone=fitted_alone)
        if bias is not None:
            tensors[tensor_name(block.index, kind)] = bias.float().cpu()
        tensors[tensor_name(block.index, kind, "weight")] = fitted.to(weight.dtype).cpu().contiguous()
    return tensors
