"""Local search over the kept units of a layer at a given width (OSSCAR, arXiv 2403.12983).

With the damped Gram matrix H and B = W H, the error of the refitted columns K is tr(W B^T) - tr(B_K H_KK^-1 B_K^T).
The search swaps kept and removed units while this error falls. It keeps the pair (H, B) under the sweep operator: with
K swept in, the matrix holds -H_KK^-1 and the Schur complement H_RR - H_RK H_KK^-1 H_KR of the removed units R, and the
right side holds the refitted W_K and what is left of B_R. So one formula tells what taking out a kept unit adds and
what putting back a removed one saves, and a swap is an update whose rank is the size of a unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfsp.importance.second_order import cholesky, damped, diagonal_blocks, unit_errors

#: Sweeps over the units, at most.
_SWEEPS = 20
#: A sweep counts as better where the error falls by more than this share of the output's square: rounding does not.
_SMALLEST_GAIN = 1e-12


def swap_units(weight: Tensor, gram: Tensor, kept: Tensor, *, swaps: int, damping: float, unit: int = 1) -> Tensor:
    """Swap kept units for removed ones while the squared output error of the refitted layer falls.

    A sweep takes out the cheapest kept units one after the other, and puts back as many of all units that are out, each
    time the one that lowers the error most. A sweep that does not lower the error is undone, and the next one
    swaps half as many. Costs about 2 K N^2 multiplications for the start and 4 N^2 for each swapped channel.

    Args:
        weight: W [d, N], dense.
        gram: X^T X per token [N, N].
        kept: indices of the units that stay, ascending.
        swaps: units swapped in a sweep, at first.
        damping: added to the diagonal, relative to its mean.
        unit: channels of a unit; N is a multiple of it.

    Returns:
        Indices of the units to keep, ascending, on CPU, as many as before. The error is never above that of ``kept``.
    """
    hessian, _ = damped(gram, damping)
    swept = _Swept(hessian, weight.to(gram.device, torch.float64), unit)
    smallest_gain = _SMALLEST_GAIN * swept.output_square
    is_kept = torch.zeros(gram.shape[0] // unit, dtype=torch.bool, device=gram.device)
    is_kept[kept.to(gram.device)] = True
    if bool(is_kept.all()) or not bool(is_kept.any()):
        return kept
    swept.sweep_in(is_kept.nonzero().flatten())
    swaps = min(swaps, len(kept))
    for _ in range(_SWEEPS):
        if not swaps:
            break
        before = is_kept.clone()
        growth = sum(_take_out(swept, is_kept) for _ in range(swaps)) - sum(
            _put_back(swept, is_kept) for _ in range(swaps)
        )
        if growth < -smallest_gain:
            continue
        if bool((is_kept != before).any()):
            swept.sweep_out((is_kept & ~before).nonzero().flatten())
            swept.sweep_in((before & ~is_kept).nonzero().flatten())
            is_kept = before
        swaps //= 2
    return is_kept.nonzero().flatten().cpu()


def _take_out(swept: _Swept, is_kept: Tensor) -> float:
    """Remove the kept unit that adds least to the error; return how much it adds."""
    changes = swept.changes(is_kept)
    cheapest = changes.masked_fill(~is_kept, torch.inf).argmin()
    swept.sweep_out(cheapest[None])
    is_kept[cheapest] = False
    return float(changes[cheapest])


def _put_back(swept: _Swept, is_kept: Tensor) -> float:
    """Put back the removed unit that lowers the error most; return by how much."""
    changes = swept.changes(is_kept)
    best = changes.masked_fill(is_kept, -torch.inf).argmax()
    swept.sweep_in(best[None])
    is_kept[best] = True
    return float(changes[best])


class _Swept:
    """The normal equations (H, B) of a layer under the sweep operator; no unit is swept in at first.

    Args:
        hessian: H [N, N] fp64, which is changed in place.
        weight: W [d, N] fp64.
        unit: channels of a unit.
    """

    def __init__(self, hessian: Tensor, weight: Tensor, unit: int) -> None:
        self._matrix, self._right, self._unit = hessian, weight @ hessian, unit
        self.output_square = float((self._right * weight).sum())

    def changes(self, is_kept: Tensor) -> Tensor:
        """Return the error that taking out each kept unit adds, and that putting back each removed unit saves."""
        sign = torch.where(is_kept, -1.0, 1.0).to(self._matrix.dtype)  # the blocks of kept units are negative definite
        return unit_errors(self._right, diagonal_blocks(self._matrix, self._unit) * sign[:, None, None])

    def sweep_in(self, units: Tensor) -> None:
        """Refit with these units too."""
        self._sweep(units, 1.0)

    def sweep_out(self, units: Tensor) -> None:
        """Refit without these units; the inverse of :meth:`sweep_in`."""
        self._sweep(units, -1.0)

    def _sweep(self, units: Tensor, sign: float) -> None:
        columns = (units[:, None] * self._unit + torch.arange(self._unit, device=units.device)).flatten()
        rows, right = self._matrix.index_select(0, columns), self._right.index_select(1, columns)
        factor = cholesky(sign * rows.index_select(1, columns))
        solved, solved_right = torch.cholesky_solve(rows, factor), torch.cholesky_solve(right.T, factor)
        self._matrix.addmm_(rows.T, solved, alpha=-sign)
        self._right.addmm_(solved_right.T, rows, alpha=-sign)
        self._matrix.index_copy_(0, columns, solved)
        self._matrix.index_copy_(1, columns, solved.T)
        corner = -sign * torch.cholesky_inverse(factor)
        self._matrix[columns[:, None], columns[None, :]] = corner
        self._right.index_copy_(1, columns, solved_right.T)
