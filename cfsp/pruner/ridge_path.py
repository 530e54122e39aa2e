"""Choose the strength of a ridge regression by its error on tokens that are held out.

A refit has as many coefficients for each output as it has inputs. Where a model sees few tokens for each, a weak ridge
fits their noise, and the pruned model becomes worse on any other text although the error on the calibration tokens
falls. How strong the ridge has to be differs between blocks, models and calibration sets, so it is measured: the
normal equations of the tokens that are not held out are solved over a path of strengths from one eigendecomposition,
and the tokens that are held out choose. "No change at all" is on the path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Strengths of the path, relative to the mean of the Gram matrix's diagonal.
RIDGES = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class NormalEquations:
    """The equations system x = right of a least-squares problem, per token.

    Attributes:
        system: X^T X [K, K].
        right: X^T T [K, d] for the change T of the output that is sought.
    """

    system: Tensor
    right: Tensor


def choose_ridge(fitted: NormalEquations, held_out: NormalEquations, scale: float) -> tuple[float | None, list[float]]:
    """Choose the ridge with the lowest error on the tokens that are held out.

    With fitted.system = Q D Q^T the solution for a ridge r is x = Q (D + r scale I)^-1 Q^T right, and its squared error
    on other tokens, less that of x = 0, is tr(x^T system x) - 2 tr(x^T right) with the equations of those tokens.

    Args:
        fitted: equations of the tokens that are fitted.
        held_out: equations of the tokens that are held out, on the same device.
        scale: value that a ridge of 1 adds to the diagonal.

    Returns:
        The ridge, None where no change at all is the best; and for each of :data:`RIDGES` the error per token less
        that of no change. Both are (None, []) where the system cannot be decomposed.
    """
    try:
        values, vectors = torch.linalg.eigh(fitted.system.double())
    except RuntimeError:  # LAPACK did not converge: such a matrix tells nothing
        return None, []
    right = vectors.T @ fitted.right.double()
    system = vectors.T @ held_out.system.double() @ vectors
    target = vectors.T @ held_out.right.double()
    errors = []
    for ridge in RIDGES:
        solution = right / (values.clamp_min(0) + max(ridge * scale, 1e-300))[:, None]
        errors.append(float((solution * (system @ solution)).sum() - 2 * (solution * target).sum()))
    best = min(range(len(errors)), key=lambda index: errors[index])
    return (RIDGES[best] if errors[best] < 0 else None), errors
