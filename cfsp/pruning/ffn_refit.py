"""Gauss-Newton refit of one pruned FFN: from the pairs of calibration to the weights that a plan replaces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cfsp.pruning.gauss_newton import FFNFunction, Matrices, gauss_newton
from cfsp.pruning.plan import tensor_name

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.calibrate.ffn_pairs import FFNPairs
    from cfsp.models.activation import Activation
    from cfsp.models.ffn import FFN


def refit_ffn(
    block: int, ffn: FFN, pairs: FFNPairs, activation: Activation, *, steps: int, cg_iterations: int, damping: float
) -> tuple[dict[str, Tensor], list[float]]:
    """The replaced weights of a sliced FFN by their names in the plan, and its errors on the pairs that were held out.

    No tensors where no step lowered the error; biases stay what they are.
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
    found, errors = gauss_newton(
        function,
        start,
        pairs.fitted,
        pairs.held_out,
        steps=steps,
        cg_iterations=cg_iterations,
        damping=damping,
    )
    if found is start:
        return {}, errors
    refitted = {f"{name}_weight": matrix for name, matrix in zip(projections, found.enter, strict=True)}
    refitted["weight"] = found.down
    dtype = output.weight.dtype
    return {
        tensor_name(block, "ffn", what): matrix.to(dtype).cpu().contiguous() for what, matrix in refitted.items()
    }, errors
