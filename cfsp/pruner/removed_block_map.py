"""Compensation of whole blocks or submodules that are gone, folded into weights that stay.

A *gap* is a run of removed submodules without a kept one in between. With Y the hidden state before it and L the one
behind it, both of the dense model, two compensations give the rest of the model something nearer to L than Y is.

linear_map (ReplaceMe, arXiv 2505.02819): the last kept submodule before the gap writes M to the residual stream. Its
output is replaced by M T, where T minimises ||(Y - M) + M T - L||^2. With X = T - I this is

    X = (M^T M + r s I)^-1 M^T (L - Y),   s = mean diag(M^T M)

which for r = 0 is the published T = (M^T M)^-1 M^T (L + M - Y). A ridge r pulls T towards the identity, i.e. the plain
removal, where the published one pulls it towards zero. T is folded into the projection: W <- T^T W, b <- T^T b. Where
the last kept submodule is an attention (BlockPruner removes FFNs alone too), this is its ``o_proj``.

scale (Prune&Comp, arXiv 2507.18212): the hidden state behind the gap is s times as large as the one before it, with s
the mean over the channels of mean|L| / mean|Y|. The published method multiplies by s everything that writes to the
stream before the gap: the embedding and each ``o_proj`` and ``down_proj``. A tied embedding is the head too, which
would change with it. Here the projections BEHIND the gap are divided by s instead. This is the same function: the
stream as a whole differs by the factor s, and each reader of it begins with a norm that a factor does not change. The
head reads the final norm. The embedding therefore stays as it is, tied or not. What differs is the norms' epsilon
alone. The published method also chooses the blocks anew after each removal; here the pruner chooses them, and all
factors are those of the dense model.

Both need blocks that add the outputs of their projections to the stream as they are, and scale needs norms before
every reader. :func:`cfsp.pruner.residual_check.check_residual_stream` finds this out by running one block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cfsp.calibration.gram import HeldOutRows, HoldOut
from cfsp.errors import RunError
from cfsp.plan.pruning_plan import BlockPlan, tensor_name
from cfsp.pruner.gaps import Batch, Place, collect_states, find_gaps, is_kept, iterate_submodules
from cfsp.pruner.least_squares import Ridge, solve
from cfsp.pruner.ridge_path import NormalEquations, choose_ridge

if TYPE_CHECKING:
    from cfsp.architecture.views import DecoderView
    from cfsp.pruner.base import PlanContext

log = logging.getLogger(__name__)


@dataclass
class _Moments:
    """Moments of one gap, summed over the tokens in float64.

    Attributes:
        system: M^T M [d, d].
        right: M^T (L - Y) [d, d].
        tokens: number of tokens.
    """

    system: Tensor | float = 0.0
    right: Tensor | float = 0.0
    tokens: int = 0

    def add(self, written: Tensor, change: Tensor) -> None:
        """Add rows of M and of L - Y, [n, d] each."""
        if len(written):
            self.system = self.system + written.T @ written
            self.right = self.right + written.T @ change
            self.tokens += len(written)

    def equations(self) -> NormalEquations:
        assert isinstance(self.system, Tensor)
        assert isinstance(self.right, Tensor)
        return NormalEquations(self.system / self.tokens, self.right / self.tokens)

    def plus(self, other: _Moments) -> _Moments:
        return _Moments(self.system + other.system, self.right + other.right, self.tokens + other.tokens)


def fold_linear_maps(
    context: PlanContext, blocks: Sequence[BlockPlan], ridge: Ridge
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Fold a linear map into the last projection before each gap (see the module's text).

    The moments of all gaps are added up in one pass of the dense model over the calibration set.

    Args:
        blocks: the decision on each block.
        ridge: strength relative to s, or auto.

    Returns:
        The replaced tensors by their names in the plan, and for each gap what was done.
    """
    view = context.driver.view
    all_gaps = find_gaps(view, blocks)
    hold_out: HoldOut = HeldOutRows.among(len(context.calibration.input_ids)).unit if ridge == "auto" else "nothing"
    fitted, held_out = [_Moments() for _ in all_gaps], [_Moments() for _ in all_gaps]
    rows = HeldOutRows(hold_out)

    def add(batch: Batch) -> None:
        sequences, tokens = batch.shape
        out = rows.mask(sequences, tokens, torch.device("cpu")) if hold_out != "nothing" else None
        for gap, fit, held in zip(all_gaps, fitted, held_out, strict=True):
            if gap.writer is None:
                continue
            change = batch.state(gap.behind) - batch.state(gap.before)
            written = batch.written(gap.writer).to(change.device)
            if out is None:
                fit.add(written, change)
            else:
                which = out.to(change.device)
                fit.add(written[~which], change[~which])
                held.add(written[which], change[which])

    collect_states(context.driver, context.calibration.input_ids, all_gaps, add)
    tensors: dict[str, Tensor] = {}
    facts: list[dict[str, Any]] = []
    for gap, fit, held in zip(all_gaps, fitted, held_out, strict=True):
        facts.append({"removed": [list(place) for place in gap.removed], "folded_into": None})
        if gap.writer is None:
            log.warning(
                "pruner.compensation=linear_map: nothing before block %d stays, so that its removal is not "
                "compensated; use sparsity.protect=[1,0]", gap.removed[0][0],
            )  # fmt: skip
            continue
        chosen, change = _solve(fit, held, ridge)
        facts[-1] |= {"folded_into": list(gap.writer), "ridge": chosen}
        if change is not None:
            tensors |= _apply_map(view, gap.writer, change)
    return tensors, facts


def _solve(fitted: _Moments, held_out: _Moments, ridge: Ridge) -> tuple[float | None, Tensor | None]:
    """Return the ridge and X [d, d] float64; (None, None) where no map lowers the error on held-out tokens."""
    total = fitted.plus(held_out) if held_out.tokens else fitted
    equations = total.equations()
    if not bool(equations.system.isfinite().all() and equations.right.isfinite().all()):
        raise RunError(
            "pruner.compensation=linear_map: the moments of the hidden states are not finite; try model.dtype=float32, "
            "or pruner.compensation=none"
        )
    strength: float | None
    if ridge != "auto":
        strength = ridge
    elif not held_out.tokens or not fitted.tokens:
        strength = None
    else:
        part = fitted.equations()
        strength, _ = choose_ridge(part, held_out.equations(), float(part.system.diagonal().mean()))
    if strength is None:
        return None, None
    return strength, solve(equations.system, equations.right, strength * float(equations.system.diagonal().mean()))


def _apply_map(view: DecoderView, writer: Place, change: Tensor) -> dict[str, Tensor]:
    """Return weight and bias of a projection whose output is followed by I + X."""
    return _change_projection(view, writer, lambda matrix: matrix + change.to(matrix.device).T @ matrix)


def fold_scales(context: PlanContext, blocks: Sequence[BlockPlan]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Divide the projections behind each gap by its factor (see the module's text).

    A projection behind several gaps is divided by all of their factors. Nothing is written behind a gap that ends the
    model, and its factor does not matter, because the final norm removes it.

    Args:
        blocks: the decision on each block.

    Returns:
        The replaced tensors by their names in the plan, and the factor of each gap.
    """
    view = context.driver.view
    all_gaps = find_gaps(view, blocks)
    sums: list[list[Tensor | float]] = [[0.0, 0.0] for _ in all_gaps]

    def add(batch: Batch) -> None:
        for gap, total in zip(all_gaps, sums, strict=True):
            for end, point in enumerate((gap.before, gap.behind)):
                total[end] = total[end] + batch.state(point).abs().sum(0).cpu()

    collect_states(context.driver, context.calibration.input_ids, all_gaps, add)
    factors = [channel_ratio(*map(torch.as_tensor, total)) for total in sums]
    tensors: dict[str, Tensor] = {}
    for place in iterate_submodules(view):
        factor = 1.0
        for gap, own in zip(all_gaps, factors, strict=True):
            factor *= own if gap.removed[-1] < place else 1.0
        if factor != 1.0 and is_kept(place, blocks):
            tensors |= _change_projection(view, place, lambda matrix, factor=factor: matrix / factor)  # type: ignore[misc]
    facts = [
        {"removed": [list(place) for place in gap.removed], "factor": factor}
        for gap, factor in zip(all_gaps, factors, strict=True)
    ]
    return tensors, facts


def channel_ratio(before: Tensor, behind: Tensor) -> float:
    """Return the mean over the channels of mean|L| / mean|Y|; channels that are zero before the gap do not count.

    Args:
        before: sums of |Y| [d], float64.
        behind: sums of |L| [d], float64, over the same tokens.

    Raises:
        RunError: the ratio is not a positive number.
    """
    alive = before > 0
    ratio = float((behind[alive] / before[alive]).mean()) if bool(alive.any()) else 1.0
    if not (0 < ratio < float("inf")):
        raise RunError(
            "pruner.compensation=scale: the hidden states around a removed run have no finite ratio; try "
            "model.dtype=float32, or pruner.compensation=none"
        )
    return ratio


def _change_projection(view: DecoderView, place: Place, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return weight [d, N] and bias (as a column [d, 1]) of a projection after ``change``, computed in float64."""
    index, kind = place
    block = view.blocks[index]
    with view.weights.resident(block):
        output = block.channels[kind].output
        weight = output.weight.detach()
        tensors = {tensor_name(index, kind, "weight"): change(weight.double()).to(weight.dtype).cpu().contiguous()}
        if output.bias is not None:
            bias = change(output.bias.detach().double()[:, None])[:, 0]
            tensors[tensor_name(index, kind)] = bias.float().cpu().contiguous()
    return tensors
