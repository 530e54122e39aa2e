"""Gauss-Newton refit of one pruned FFN: from calibration pairs to the replaced weights of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cfsp.plan.pruning_plan import tensor_name
from cfsp.pruner.gauss_newton import FFNFunction, Matrices, gauss_newton

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.activation import Activation
    from cfsp.architecture.ffn import FFN
    from cfsp.calibration.ffn_pairs import FFNPairs


def refit_ffn(
    block: int, ffn: FFN, pairs: FFNPairs, activation: Activation, *, steps: int, cg_iterations: int, damping: float
) -> tuple[dict[str, Tensor], list[float]]:
    """Refit the matrices of a sliced FFN to its target outputs; biases do not change.

    Args:
        block: index of the block.
        pairs: inputs and target outputs; one part to fit to, one part held out.
        steps: number of Gauss-Newton steps, at most.
        cg_iterations: iterations of conjugate gradients in each step.
        damping: relative to the mean of the diagonal of J^T J.

    Returns:
        The replaced weights by their names in the plan (empty where no step lowered the error), and the errors on the
        held-out pairs.
    """
    projections, output = ffn.inputs, ffn.output
    biases = [projection.bias for projection in projections.values()]
    function = FFNFunction(
        activation,
        None if biases[0] is None else torch.stack([bias.detach().float() for bias in biases if bias is not None]),
        None if output.bias is None else output.bias.detach().float(),
    )
    start = Matrices(
        torch.stack([projection.weight.detach().float() for projection in projections.values()]),
        output.weight.detach().float(),
    )
    best, errors = gauss_newton(
        function,
        start,
        pairs.fitted,
        pairs.held_out,
        steps=steps,
        cg_iterations=cg_iterations,
        damping=damping,
    )
    if best is start:
        return {}, errors
    refitted = {f"{name}_weight": matrix for name, matrix in zip(projections, best.enter, strict=True)}
    refitted["weight"] = best.down
    dtype = output.weight.dtype
    return {
        tensor_name(block, "ffn", matrix_name): matrix.to(dtype).cpu().contiguous()
        for matrix_name, matrix in refitted.items()
    }, errors
