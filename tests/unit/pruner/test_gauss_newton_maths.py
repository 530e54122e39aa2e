"""The Gauss-Newton refit of whole FFNs: its maths against autograd, its steps, and when it stops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cfsp.pruner import gauss_newton as maths
from cfsp.pruner.gauss_newton import FFNFunction, Matrices, gauss_newton
from tests.helpers.tensors import close, normal

pytestmark = pytest.mark.usefixtures("one_thread")


def matrices(m: int = 2, n: int = 11, d: int = 6, out: int = 5, seed: int = 0) -> Matrices:
    return Matrices(normal(m, n, d, seed=seed, scale=0.5), normal(out, n, seed=seed + 100, scale=0.5))


def biased(m: int, n: int, out: int, enter: bool, down: bool, activation=functional.silu) -> FFNFunction:
    return FFNFunction(
        activation, normal(m, n, seed=7, scale=0.3) if enter else None, normal(out, seed=8) if down else None
    )


def reference(function: FFNFunction, x: Tensor, enter: Tensor, down: Tensor) -> Tensor:
    """The FFN as it is written down, in fp64."""
    before = [x @ matrix.T for matrix in enter]
    if function.enter_bias is not None:
        before = [value + bias.double() for value, bias in zip(before, function.enter_bias, strict=True)]
    hidden = function.activation(before[0])
    if len(before) == 2:
        hidden = hidden * before[1]
    outputs = hidden @ down.T
    return outputs if function.down_bias is None else outputs + function.down_bias.double()


def parts(sizes: tuple[int, ...], d: int = 6, out: int = 5, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    return [(normal(n, d, seed=seed + at), normal(n, out, seed=seed + 50 + at)) for at, n in enumerate(sizes)]


def together(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in pairs]).double(), torch.cat([target for _, target in pairs]).double()


# The maths, against autograd


@pytest.fixture
def small_pieces(monkeypatch) -> None:
    """So that a few tokens are several pieces, the last of which is smaller."""
    monkeypatch.setattr(maths, "_ROWS", 7)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("m", [1, 2], ids=["plain", "gated"])
@pytest.mark.parametrize(("enter", "down"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("activation", [functional.silu, functional.gelu, torch.tanh])
def test_gradient_and_curvature_are_those_of_autograd(m, enter, down, activation) -> None:
    function, at, along = biased(m, 11, 5, enter, down, activation), matrices(m), matrices(m, seed=1)
    pairs = parts((20, 3, 1, 8))
    x, target = together(pairs)
    point = (at.enter.double(), at.down.double())

    def outputs(enter: Tensor, down: Tensor) -> Tensor:
        return reference(function, x, enter, down)

    left = target - outputs(*point)
    assert function.error(pairs, at) == pytest.approx(float(left.square().mean()), rel=1e-5)

    def transposed(by: Tensor) -> tuple[Tensor, Tensor]:
        return torch.autograd.functional.vjp(outputs, point, by)[1]

    steepest, _ = function.gradient(pairs, at)
    for found, expected in zip((steepest.enter, steepest.down), transposed(left), strict=True):
        close(found, expected / len(x))

    _, moved = torch.autograd.functional.jvp(outputs, point, (along.enter.double(), along.down.double()))
    bent = function.curvature(pairs, at, along)
    for found, expected in zip((bent.enter, bent.down), transposed(moved), strict=True):
        close(found, expected / len(x))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("m", [1, 2], ids=["plain", "gated"])
def test_the_diagonal_is_a_product_of_means(m) -> None:
    function, at, pairs = biased(m, 11, 5, True, True), matrices(m), parts((20, 3, 8))
    x, _ = together(pairs)
    before = [x @ e.double().T + b.double() for e, b in zip(at.enter, function.enter_bias, strict=True)]
    first = before[0].requires_grad_()
    value = functional.silu(first)
    (slope,) = torch.autograd.grad(value.sum(), first)
    slopes = [slope * before[1], value] if m == 2 else [slope]
    hidden = value * before[1] if m == 2 else value
    _, diagonal = function.gradient(pairs, at)
    by_neuron = torch.stack([one.square().mean(0) for one in slopes]) * at.down.double().square().sum(0)
    close(diagonal.enter, (by_neuron[..., None] * x.square().mean(0)).detach())
    close(diagonal.down, hidden.square().mean(0).expand(5, -1).detach())
    close(function.hidden(x.float(), at.enter), hidden.detach())


def test_of_one_token_the_diagonal_is_exact() -> None:
    function, at, pairs = biased(2, 11, 5, True, False), matrices(), parts((1,))
    x, _ = together(pairs)
    jacobian = torch.func.jacrev(lambda e, d: reference(function, x, e, d)[0], argnums=(0, 1))(
        at.enter.double(), at.down.double()
    )
    _, diagonal = function.gradient(pairs, at)
    for found, of in zip((diagonal.enter, diagonal.down), jacobian, strict=True):
        close(found, of.square().sum(0))


def test_how_the_tokens_are_cut_does_not_matter(monkeypatch) -> None:
    function, at, along, pairs = biased(2, 11, 5, True, True), matrices(), matrices(seed=1), parts((40,))
    (x, target), found = pairs[0], []
    for rows, cut in ((4096, pairs), (7, pairs), (4096, [(x[:1], target[:1]), (x[1:33], target[1:33])])):
        monkeypatch.setattr(maths, "_ROWS", rows)
        both = cut if len(cut) == 1 else [*cut, (x[33:], target[33:])]
        found.append((function.error(both, at), function.gradient(both, at)[0], function.curvature(both, at, along)))
    for error, steepest, bent in found[1:]:
        assert error == pytest.approx(found[0][0], rel=1e-6)
        for one, other in ((steepest, found[0][1]), (bent, found[0][2])):
            close(one.enter, other.enter)
            close(one.down, other.down)


def test_pieces_shrink_where_an_ffn_is_wide() -> None:
    at = Matrices(torch.zeros(1, 2**15, 1), torch.zeros(1, 2**15))
    sizes = [len(x) for x, _ in maths._pieces([(torch.zeros(1100, 1), torch.zeros(1100, 1))], at)]
    assert sizes == [512, 512, 76]
    wider = Matrices(torch.zeros(1, 2**20, 1), torch.zeros(1, 2**20))
    assert [len(x) for x, _ in maths._pieces([(torch.zeros(300, 1), torch.zeros(300, 1))], wider)] == [256, 44]


def test_low_precision_pairs_are_worked_on_in_single() -> None:
    function, at = biased(2, 11, 5, False, False), matrices()
    x, target = parts((30,))[0]
    low = [(x.bfloat16(), target.bfloat16())]
    single = [(x.bfloat16().float(), target.bfloat16().float())]
    assert function.error(low, at) == function.error(single, at)
    assert torch.equal(function.gradient(low, at)[0].enter, function.gradient(single, at)[0].enter)


# A step


def constant_slope(x: Tensor) -> Tensor:
    """1 or -1: of no slope, so that down alone can move."""
    return x.sign().detach() + 0 * x


def best_down(x: Tensor, target: Tensor, function: FFNFunction, enter: Tensor) -> Tensor:
    """Columns of down by numpy's least squares."""
    import numpy as np

    hidden = function.hidden(x.float(), enter).double()
    return torch.from_numpy(np.linalg.lstsq(hidden.numpy(), target.numpy(), rcond=None)[0]).T


def test_where_down_alone_can_move_a_step_is_exact_least_squares() -> None:
    function, at, pairs = FFNFunction(constant_slope), matrices(1), parts((150, 50))
    found, errors = gauss_newton(function, at, pairs, pairs, steps=1, cg_iterations=60, damping=0.0)
    assert torch.equal(found.enter, at.enter)
    close(found.down, best_down(*together(pairs), function, at.enter), 1e-4)
    assert len(errors) == 2


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_the_damped_normal_equations_are_solved(damping) -> None:
    """Against the dense matrix J^T J + damping of one small FFN."""
    function, at, pairs = biased(2, 4, 3, True, True), matrices(2, 4, 3, 3), parts((60,), 3, 3)
    x, target = together(pairs)
    point = (at.enter.double(), at.down.double())
    jacobian = torch.func.jacrev(lambda e, d: reference(function, x, e, d), argnums=(0, 1))(*point)
    flat = torch.cat([of.flatten(2).flatten(0, 1) for of in (jacobian[0].flatten(2), jacobian[1].flatten(2))], 1)
    _, diagonal = function.gradient(pairs, at)
    added = torch.cat([damping * part.double().mean().expand(part.numel()) for part in (diagonal.enter, diagonal.down)])
    left = (target - reference(function, x, *point)).flatten()
    # A gated FFN has directions that change nothing (scale of up against down): the shortest of the solutions.
    expected = torch.linalg.pinv(flat.T @ flat / len(x) + added.diag(), rtol=1e-7) @ (flat.T @ left / len(x))
    step = maths._solve(function, pairs, at, 200, damping)
    found = torch.cat([step.enter.flatten(), step.down.flatten()]).double()
    close(flat @ found, flat @ expected, 5e-3)
    if damping:
        close(found, expected, 5e-3)


def test_a_linear_ffn_falls_to_where_down_alone_cannot_get() -> None:
    """Targets of a teacher near by; with down alone the error of the moved rows of up stays."""
    function, teacher = FFNFunction(lambda x: 1.0 * x), matrices(1, 4, 6, 5)
    x = normal(300, 6, seed=3)
    pairs = [(x, function.hidden(x, teacher.enter) @ teacher.down.T)]
    start = Matrices(
        teacher.enter + normal(1, 4, 6, seed=4, scale=0.02), teacher.down + normal(5, 4, seed=5, scale=0.02)
    )
    down_alone = Matrices(start.enter, best_down(*together(pairs), function, start.enter).float())
    _, errors = gauss_newton(function, start, pairs, pairs, steps=1, cg_iterations=200, damping=0.0)
    assert errors[1] < 0.05 * function.error(pairs, down_alone) < 0.05 * errors[0]


@pytest.mark.parametrize("m", [1, 2], ids=["plain", "gated"])
def test_a_refit_beats_least_squares_in_down_on_other_tokens(m) -> None:
    """A teacher of 16 neurons, 10 of which are left: what gate and up add holds on tokens that no step saw."""
    function = biased(m, 16, 5, False, True)
    teacher, x = matrices(m, 16), normal(3000, 6, seed=3)
    targets = function.hidden(x, teacher.enter) @ teacher.down.T + function.down_bias
    pairs, held, others = (
        [(x[part], targets[part])] for part in (slice(0, 1500), slice(1500, 2000), slice(2000, None))
    )
    enter = teacher.enter[:, :10]
    hidden = best_down(*together([(pairs[0][0], pairs[0][1] - function.down_bias)]), function, enter)
    start = Matrices(enter, hidden.float())
    found, errors = gauss_newton(function, start, pairs, held, steps=6, cg_iterations=60, damping=1e-4)
    assert len(errors) > 3
    assert function.error(others, found) < 0.6 * function.error(others, start)


def test_conjugate_gradients_end_where_they_are_done() -> None:
    """Without damping they would go on along the directions that change nothing, and far away."""
    function, teacher = FFNFunction(lambda x: 1.0 * x), matrices(1, 4, 6, 5)
    x = normal(300, 6, seed=3)
    pairs = [(x, function.hidden(x, teacher.enter) @ teacher.down.T)]
    start = teacher.plus(matrices(1, 4, 6, 5, seed=4), 0.05)
    few, many = (maths._solve(function, pairs, start, n, 0.0) for n in (30, 1000))
    close(many.enter, few.enter, 1e-3)
    close(many.down, few.down, 1e-3)


def test_more_iterations_solve_better_and_damping_shortens() -> None:
    function, at, pairs = biased(2, 11, 5, True, True), matrices(), parts((200,))

    def model_error(step: Matrices) -> float:
        """|t - f - J s|^2, up to a constant."""
        left, _ = function.gradient(pairs, at)
        return float(step.dot(function.curvature(pairs, at, step)) - 2 * left.dot(step))

    values = [model_error(maths._solve(function, pairs, at, n, 0.0)) for n in (1, 3, 10, 40)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0] < 0
    lengths = [
        float(step.dot(step))
        for step in (maths._solve(function, pairs, at, 40, damping) for damping in (0.0, 0.1, 10.0))
    ]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[2] < 0.1 * lengths[0]


# When to stop


def test_the_error_on_what_is_fitted_never_rises() -> None:
    function, at, pairs = biased(2, 11, 5, True, True), matrices(), parts((50, 30))
    _, errors = gauss_newton(function, at, pairs, pairs, steps=8, cg_iterations=20, damping=1e-3)
    assert len(errors) > 3
    assert all(after < before for before, after in itertools.pairwise(errors))


def test_steps_end_with_what_was_asked() -> None:
    function, at, pairs = biased(2, 11, 5, True, True), matrices(), parts((50, 30))
    results = [gauss_newton(function, at, pairs, pairs, steps=n, cg_iterations=5, damping=1e-3) for n in (1, 2, 3)]
    assert [len(errors) for _, errors in results] == [2, 3, 4]
    assert results[0][1] == results[2][1][:2]
    assert function.error(pairs, results[2][0]) == results[2][1][-1]


def test_the_best_on_what_was_held_out_is_returned() -> None:
    """Noise is learnt by heart: the held-out error falls, then rises, and what it rose with is not returned."""
    function, teacher = biased(2, 11, 5, False, False), matrices()
    pairs = parts((90, 400))
    pairs = [(x, function.hidden(x, teacher.enter) @ teacher.down.T + 0.5 * noise) for x, noise in pairs]
    fitted, held = pairs[:1], pairs[1:]
    start = teacher.plus(matrices(seed=5), 0.7)
    found, errors = gauss_newton(function, start, fitted, held, steps=30, cg_iterations=10, damping=1e-3)
    assert 3 <= len(errors) < 31
    assert errors[-1] >= errors[-2]
    assert errors[-2] == min(errors)
    assert function.error(held, found) == errors[-2]
    assert found is not start


def test_the_start_is_returned_where_nothing_helps() -> None:
    function, start = biased(2, 11, 5, True, True), matrices()
    x = normal(60, 6, seed=3)
    given = function._outputs(function.hidden(x, start.enter), start)
    # Nothing to gain: targets are what it gives, to the last bit.
    found, errors = gauss_newton(function, start, [(x, given)], [(x, given)], steps=3, cg_iterations=5, damping=1e-3)
    assert found is start
    assert errors == [0.0]
    # Other tokens say that every step is for the worse.
    found, errors = gauss_newton(
        function, start, parts((30,)), [(x, given)], steps=3, cg_iterations=5, damping=1e-3
    )  # fmt: skip
    assert found is start
    assert errors[0] == 0.0
    assert len(errors) == 2


def test_a_step_that_is_too_long_is_halved(monkeypatch) -> None:
    function, at, pairs = biased(2, 11, 5, True, True), matrices(), parts((80,))
    solved = maths._solve(function, pairs, at, 30, 1e-2)
    lengths = {}
    for factor in (1.0, 16.0, 1e6, -1.0):
        longer = Matrices(factor * solved.enter, factor * solved.down)
        monkeypatch.setattr(maths, "_solve", lambda *_, step=longer: step)
        found, errors = gauss_newton(function, at, pairs, pairs, steps=1, cg_iterations=1, damping=0.0)
        moved = Matrices(found.enter - at.enter, found.down - at.down)
        lengths[factor] = (moved.dot(solved) / solved.dot(solved)).item()
        assert errors[-1] <= errors[0]
    assert lengths[1.0] == pytest.approx(1, rel=1e-4)
    assert 1 <= lengths[16.0] < 16
    assert lengths[1e6] == lengths[-1.0] == 0


@pytest.mark.parametrize("what", ["inputs", "targets", "held-out targets", "start", "infinite inputs"])
def test_what_is_not_finite_ends_the_steps(what) -> None:
    function, start = biased(2, 11, 5, True, True), matrices()
    pairs, held = parts((30,)), parts((10,), seed=1)
    bad = math.inf if what.startswith("infinite") else math.nan
    if what == "start":
        start.down[1, 2] = bad
    else:
        chosen = held if what.startswith("held") else pairs
        chosen[0][0 if what.endswith("inputs") else 1][3, 2] = bad
    found, errors = gauss_newton(function, start, pairs, held, steps=3, cg_iterations=5, damping=1e-3)
    assert found is start
    assert len(errors) <= 2


def test_a_step_that_overflows_is_not_taken(monkeypatch) -> None:
    function, start, pairs = biased(2, 11, 5, True, True), matrices(), parts((30,))
    huge = Matrices(torch.full_like(start.enter, 1e38), torch.full_like(start.down, 1e38))
    monkeypatch.setattr(maths, "_solve", lambda *_: huge)
    assert gauss_newton(function, start, pairs, pairs, steps=2, cg_iterations=1, damping=0.0)[0] is start


@pytest.mark.parametrize("damping", [0.0, 1e-3])
@pytest.mark.parametrize(
    "case", ["dead", "all dead", "twins", "few tokens", "one token", "dead input", "small", "large"]
)
def test_hopeless_systems_stay_finite_and_do_not_get_worse(case, damping) -> None:
    function, start = FFNFunction(functional.relu), matrices()
    n = {"few tokens": 5, "one token": 1}.get(case, 60)
    pairs = parts((n,))
    if case == "dead":
        start.enter[:, 3] = 0
        start.enter[1, 4] = 0
        start.down[:, 5] = 0
    if case == "all dead":
        start.enter.zero_()
        start.down.zero_()
    if case == "twins":
        start.enter[:, 7], start.down[:, 7] = start.enter[:, 2], start.down[:, 2]
    if case == "dead input":
        pairs[0][0][:, 1] = 0
    if case in ("small", "large"):
        factor = 1e-12 if case == "small" else 1e6
        pairs = [(factor * x, factor**2 * target) for x, target in pairs]
    found, errors = gauss_newton(function, start, pairs, pairs, steps=3, cg_iterations=30, damping=damping)
    assert found.enter.isfinite().all()
    assert found.down.isfinite().all()
    assert all(map(math.isfinite, errors))
    assert function.error(pairs, found) <= errors[0]
    if case == "dead":  # what never fires has no slope, and cannot come back
        assert not found.enter[:, 3].any()
        assert len(errors) == 4
    if case == "all dead":
        assert found is start
    if case == "twins":  # from one place the two move alike, but for rounding
        close(found.enter[:, 7], found.enter[:, 2], 0.05)
        close(found.down[:, 7], found.down[:, 2], 0.05)
        assert len(errors) == 4


def test_with_nothing_held_out_no_step_is_taken() -> None:
    function, start = biased(2, 11, 5, True, True), matrices()
    found, errors = gauss_newton(function, start, parts((3,)), [], steps=3, cg_iterations=5, damping=1e-3)
    assert found is start
    assert errors == []
