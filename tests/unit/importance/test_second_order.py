"""The first-order term of second-order selection, against direct solutions of the normal equations."""

from __future__ import annotations

import pytest
import torch

import cfsp
from cfsp.config.compose import compose
from cfsp.config.identity import method_of
from cfsp.config.parse import parse
from cfsp.importance.second_order import removal_order
from tests.helpers.tiny import tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")


def problem(n: int, seed: int = 0, outputs: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [outputs, n] and the Gram matrix [n, n] of inputs that lean on each other; fp64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * n, n, dtype=torch.float64, generator=generator)
    x = x @ (torch.eye(n) + torch.randn(n, n, generator=generator) / 2).double()
    return torch.randn(outputs, n, dtype=torch.float64, generator=generator), x.T @ x / len(x)


def damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def error(weight: torch.Tensor, hessian: torch.Tensor, kept: list[int]) -> float:
    """Squared output error with these columns, refitted by the normal equations."""
    change = -weight
    if kept:
        change = change.clone()
        change[:, kept] += torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight.T).T
    return float((change @ hessian @ change.T).trace())


def greedy(weight: torch.Tensor, hessian: torch.Tensor, unit: int) -> list[int]:
    """Order of removal by |B . W| + W (H^-1)_gg^-1 W / 2, with everything solved anew for each step."""
    target, n_units, order = weight @ hessian, weight.shape[1] // unit, []
    while len(order) < n_units:
        left = [index for index in range(n_units) if index not in order]
        columns = [index * unit + channel for index in left for channel in range(unit)]
        inverse = torch.linalg.inv(hessian[columns][:, columns])
        refitted = target[:, columns] @ inverse
        values = []
        for position in range(len(left)):
            own = slice(position * unit, (position + 1) * unit)
            first = float((target[:, columns][:, own] * refitted[:, own]).sum().abs())
            second = float((refitted[:, own] @ torch.linalg.inv(inverse[own, own]) @ refitted[:, own].T).trace())
            values.append(first + second / 2)
        order.append(left[min(range(len(left)), key=lambda position: values[position])])
    return order


@pytest.mark.parametrize("unit", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_the_first_order_term_changes_the_order_and_not_what_a_removal_costs(seed, unit) -> None:
    weight, gram = problem(12, seed)
    hessian = damped(gram, 1e-2)
    order, increments = removal_order(weight, gram, damping=1e-2, unit=unit, first_order=True)
    assert order.tolist() == greedy(weight, hessian, unit)
    if unit == 1:
        assert order.tolist() != removal_order(weight, gram, damping=1e-2)[0].tolist()
    errors = []
    for removed in range(1, len(order) + 1):
        kept = sorted(int(index) * unit + channel for index in order[removed:] for channel in range(unit))
        errors.append(error(weight, hessian, kept))
    torch.testing.assert_close(increments.cumsum(0), torch.tensor(errors, dtype=torch.float64), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("step", [2, 5])
def test_steps_of_several_with_the_first_order_term_end_at_the_same_total(step) -> None:
    weight, gram = problem(20)
    order, increments = removal_order(weight, gram, damping=1e-2, step=step, first_order=True)
    assert sorted(order.tolist()) == list(range(20))
    for removed in (step, 2 * step, 20):
        expected = error(weight, damped(gram, 1e-2), sorted(order[removed:].tolist()))
        assert float(increments[:removed].sum()) == pytest.approx(expected, rel=1e-8)


def test_inputs_that_are_never_there_cost_nothing_with_the_first_order_term() -> None:
    order, increments = removal_order(torch.ones(3, 8), torch.zeros(8, 8), first_order=True)
    assert sorted(order.tolist()) == list(range(8))
    assert not increments.any()


def test_options_that_are_off_leave_the_identity_as_it_was() -> None:
    def importance(*words: str) -> dict[str, object]:
        return method_of(parse(compose(["pruner=one_shot", "importance=obs", *words])))["importance"]

    assert importance() == {"component": "obs", "damping": 1e-3, "step": None}
    assert importance("importance.first_order=true") == {**importance(), "first_order": True}


@pytest.mark.parametrize("structure", ["ffn", "heads_ffn"])
@pytest.mark.parametrize("allocator", ["uniform", "reconstruction"])
def test_the_first_order_term_changes_a_plan_of_the_same_size(structure, allocator) -> None:
    plain, with_term = (
        cfsp.prune(
            tiny_model(), tokens(8), "one_shot", 0.4, scope="decoder", round_to=8,
            overrides=["importance=obs", f"importance.first_order={on}", f"allocator={allocator}",
                       f"pruner.structure={structure}", "pruner.compensation=least_squares"],
        )
        for on in ("false", "true")
    )  # fmt: skip
    assert plain.blocks != with_term.blocks
    assert with_term.achieved["ratio"] == pytest.approx(0.4, abs=0.02)
