"""Gauss-Newton refit of the kept neurons of an FFN: rows of gate and up are fitted along with columns of down.

Least squares (:mod:`cfsp.pruner.least_squares`) solves for down_proj alone, exactly. Here the kept neurons change too:
with f(x) = down(act(gate x) * up x) and targets t, each step linearises f in all three matrices and solves the
damped normal equations (J^T J + damping) s = J^T (t - f) by preconditioned conjugate gradients, which never form a
matrix larger than the FFN's own. Held-out tokens decide which step is the last, to avoid overfitting. Gradients stay
inside the block: this is layer-wise reconstruction, as for quantisation in BRECQ
(arXiv 2102.05426), not training of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cfsp.architecture.activation import Activation

#: Largest number of halvings of a step that does not lower the error.
_HALVINGS = 4
#: Conjugate gradients end where the squared residual has fallen to this share. What remains is
#: rounding error. Without damping it would grow along directions that do not change the output.
_SOLVED = 1e-12
#: Tokens at a time: this many, or as many as give this number of neuron values, so that the intermediate values of a
#: large model take little memory beside the pairs.
_ROWS, _VALUES = 4096, 2**24

#: Inputs [n, d] and targets [n, d_out] of one part of the tokens.
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Matrices:
    """The matrices of an FFN, or a direction in their space.

    Attributes:
        enter: gate and up, or up alone [m, N, d].
        down: [d_out, N].
    """

    enter: Tensor
    down: Tensor

    def plus(self, addend: Matrices, scale: float | Tensor) -> Matrices:
        return Matrices(self.enter + scale * addend.enter, self.down + scale * addend.down)

    def times(self, other: Matrices) -> Matrices:
        return Matrices(self.enter * other.enter, self.down * other.down)

    def dot(self, other: Matrices) -> Tensor:
        return (self.enter * other.enter).sum() + (self.down * other.down).sum()


@dataclass(frozen=True)
class FFNFunction:
    """An FFN as a function of its matrices; its biases ([m, N] and [d_out], or None) are fixed."""

    activation: Activation  # elementwise
    enter_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def hidden(self, x: Tensor, enter: Tensor) -> Tensor:
        """Return the input of down_proj [n, N] for x [n, d]."""
        first, *rest = self._before(x, enter)
        return self.activation(first) * rest[0] if rest else self.activation(first)

    def linearised(self, x: Tensor, enter: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input of down_proj [n, N], and its derivatives [m, n, N] by the outputs of gate and up."""
        first, *rest = self._before(x, enter)
        with torch.enable_grad():
            variable = first.detach().requires_grad_()
            value = self.activation(variable)
            (slope,) = torch.autograd.grad(value.sum(), variable)
        value = value.detach()
        return (value * rest[0], torch.stack([slope * rest[0], value])) if rest else (value, slope[None])

    def error(self, pairs: Sequence[Pair], at: Matrices) -> float:
        """Return the mean squared difference to the targets, over tokens and outputs."""
        total, count = 0.0, 0
        for x, target in _pieces(pairs, at):
            total += float((target - self._outputs(self.hidden(x, at.enter), at)).double().square().sum())
            count += target.numel()
        return total / count

    def gradient(self, pairs: Sequence[Pair], at: Matrices) -> tuple[Matrices, Matrices]:
        """Return J^T (targets - outputs), and the diagonal of J^T J as a product of means, per token."""
        steepest, tokens = _zeros(at), 0
        slopes_squared, inputs_squared = at.enter.new_zeros(at.enter.shape[:2]), at.enter.new_zeros(at.enter.shape[2])
        hidden_squared = at.down.new_zeros(at.down.shape[1])
        for x, target in _pieces(pairs, at):
            hidden, slopes = self.linearised(x, at.enter)
            self._add_transposed(steepest, target - self._outputs(hidden, at), x, hidden, slopes, at)
            slopes_squared += slopes.square().sum(1)
            inputs_squared += x.square().sum(0)
            hidden_squared += hidden.square().sum(0)
            tokens += len(x)
        by_neuron = slopes_squared / tokens * at.down.square().sum(0)
        diagonal = Matrices(
            by_neuron[..., None] * (inputs_squared / tokens), (hidden_squared / tokens).expand_as(at.down)
        )
        return Matrices(steepest.enter / tokens, steepest.down / tokens), diagonal

    def curvature(self, pairs: Sequence[Pair], at: Matrices, along: Matrices) -> Matrices:
        """Return the product of J^T J with a direction, per token."""
        product, tokens = _zeros(at), 0
        both = torch.cat([at.down, along.down], dim=1)
        for x, _ in _pieces(pairs, at):
            hidden, slopes = self.linearised(x, at.enter)
            moved = (slopes * torch.einsum("nd,mkd->mnk", x, along.enter)).sum(0)
            self._add_transposed(product, torch.cat([moved, hidden], dim=1) @ both.T, x, hidden, slopes, at)
            tokens += len(x)
        return Matrices(product.enter / tokens, product.down / tokens)

    def _before(self, x: Tensor, enter: Tensor) -> list[Tensor]:
        values = [x @ matrix.T for matrix in enter]
        if self.enter_bias is None:
            return values
        return [value + bias for value, bias in zip(values, self.enter_bias, strict=True)]

    def _outputs(self, hidden: Tensor, at: Matrices) -> Tensor:
        outputs = hidden @ at.down.T
        return outputs if self.down_bias is None else outputs + self.down_bias

    @staticmethod
    def _add_transposed(
        into: Matrices, outputs: Tensor, x: Tensor, hidden: Tensor, slopes: Tensor, at: Matrices
    ) -> None:
        into.down.addmm_(outputs.T, hidden)
        back = outputs @ at.down
        for matrix, slope in zip(into.enter, slopes, strict=True):
            matrix.addmm_((back * slope).T, x)


def gauss_newton(
    function: FFNFunction,
    start: Matrices,
    fitted: Sequence[Pair],
    held_out: Sequence[Pair],
    *,
    steps: int,
    cg_iterations: int,
    damping: float,
) -> tuple[Matrices, list[float]]:
    """Take Gauss-Newton steps while the error on the held-out pairs falls.

    The error on ``fitted`` falls with every step. An error that is not finite ends the steps. Without held-out pairs no
    step is taken.

    Args:
        start: matrices to start from.
        fitted: pairs to fit to, in parts that are read in every iteration.
        held_out: pairs that judge the steps.
        steps: number of steps, at most.
        cg_iterations: iterations of conjugate gradients in each step.
        damping: >= 0, relative to the mean of each matrix's diagonal of J^T J.

    Returns:
        The matrices with the lowest error on ``held_out``, and the errors on it: of the start, then of each step.
    """
    if not len(held_out):
        return start, []
    at, error = start, function.error(fitted, start)
    best, errors = start, [function.error(held_out, start)]
    for _ in range(steps):
        direction = _solve(function, fitted, at, cg_iterations, damping)
        for halving in range(_HALVINGS + 1):
            moved = at.plus(direction, 0.5**halving)
            lower = function.error(fitted, moved)
            if lower < error:  # never where it is not a number
                break
        else:
            break
        at, error = moved, lower
        errors.append(function.error(held_out, at))
        if not errors[-1] < min(errors[:-1]):
            break
        best = at
    return best, errors


def _solve(function: FFNFunction, pairs: Sequence[Pair], at: Matrices, iterations: int, damping: float) -> Matrices:
    """Return the step that solves the damped normal equations, after ``iterations`` of conjugate gradients."""
    residual, diagonal = function.gradient(pairs, at)
    shifts = [damping * float(part.mean()) for part in (diagonal.enter, diagonal.down)]
    tiny = torch.finfo(torch.float32).tiny
    inverse = Matrices(
        1 / (diagonal.enter + shifts[0]).clamp_min(tiny), 1 / (diagonal.down + shifts[1]).clamp_min(tiny)
    )
    step = _zeros(at)
    scaled = residual.times(inverse)
    direction, energy = scaled, residual.dot(scaled)
    solved = _SOLVED * float(energy)
    for _ in range(iterations):
        if float(energy) <= solved:
            break
        product = function.curvature(pairs, at, direction)
        product = Matrices(product.enter + shifts[0] * direction.enter, product.down + shifts[1] * direction.down)
        curvature = float(direction.dot(product))
        if not curvature > 0 or not math.isfinite(curvature):
            break
        length = energy / curvature
        step, residual = step.plus(direction, length), residual.plus(product, -length)
        scaled = residual.times(inverse)
        energy, previous = residual.dot(scaled), energy
        direction = scaled.plus(direction, energy / previous)
    return step


def _zeros(like: Matrices) -> Matrices:
    return Matrices(torch.zeros_like(like.enter), torch.zeros_like(like.down))


def _pieces(pairs: Sequence[Pair], at: Matrices) -> Iterator[Pair]:
    size = min(_ROWS, max(256, _VALUES // at.down.shape[1]))
    for x, target in pairs:
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            yield x[rows].float(), target[rows].float()
