"""The first-order term and the swaps of second-order selection, against direct solutions of the normal equations."""

from __future__ import annotations

import itertools

import pytest
import torch

import cfsp
from cfsp.architecture.views import resolve
from cfsp.config.compose import compose
from cfsp.config.identity import method_of
from cfsp.config.parse import parse
from cfsp.errors import RunError
from cfsp.importance.local_search import _Swept, swap_units
from cfsp.importance.obs import Obs
from cfsp.importance.second_order import removal_order
from cfsp.model.driver import BlockDriver
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
    assert importance("importance.swaps=10") == {**importance(), "swaps": 10}


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


# Swaps


def channels_of(units, unit: int) -> list[int]:
    return [int(index) * unit + channel for index in units for channel in range(unit)]


@pytest.mark.parametrize("unit", [1, 3])
def test_the_swept_equations_tell_what_each_unit_adds_or_saves(unit) -> None:
    """In and out again in any order, against the errors of refits by the normal equations."""
    weight, gram = problem(12)
    hessian, n_units = damped(gram, 1e-2), 12 // unit
    swept, is_kept = _Swept(hessian.clone(), weight, unit), torch.zeros(n_units, dtype=torch.bool)
    assert swept.output_square == pytest.approx(error(weight, hessian, []))
    for into, units in ((True, [0, 2, 3]), (False, [2]), (True, [1]), (False, [0, 3]), (True, [2])):
        (swept.sweep_in if into else swept.sweep_out)(torch.tensor(units))
        is_kept[units] = into
        kept = is_kept.nonzero().flatten().tolist()
        now, expected = error(weight, hessian, channels_of(kept, unit)), []
        for index in range(n_units):
            other = sorted(set(kept) ^ {index})
            expected.append(abs(error(weight, hessian, channels_of(other, unit)) - now))
        torch.testing.assert_close(swept.changes(is_kept), torch.tensor(expected).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "unit", "greedy_finds", "swaps_find"), [(10, 1, 11, 14), (16, 2, 12, 19)])
def test_swaps_find_optima_that_greedy_misses(n, unit, greedy_finds, swaps_find) -> None:
    """Over 20 problems, against an enumeration of all sets of half of the units."""
    n_kept, optima = n // unit // 2, {"greedy": 0, "swaps": 0}
    for seed in range(20):
        weight, gram = problem(n, seed, outputs=2)
        hessian = damped(gram, 1e-2)
        order, _ = removal_order(weight, gram, damping=1e-2, unit=unit)
        kept = {"greedy": order[-n_kept:].sort().values}
        kept["swaps"] = swap_units(weight, gram, kept["greedy"], swaps=3, damping=1e-2, unit=unit)
        errors = {name: error(weight, hessian, channels_of(units, unit)) for name, units in kept.items()}
        assert errors["swaps"] <= errors["greedy"] * (1 + 1e-9)
        sets = itertools.combinations(range(n // unit), n_kept)
        lowest = min(error(weight, hessian, channels_of(units, unit)) for units in sets)
        for name, value in errors.items():
            optima[name] += value <= lowest * (1 + 1e-9)
    assert optima == {"greedy": greedy_finds, "swaps": swaps_find}


@pytest.mark.parametrize("swaps", [1, 4, 100])
@pytest.mark.parametrize("n_kept", [1, 7, 19, 20])
def test_swaps_never_raise_the_error_from_any_start(n_kept, swaps) -> None:
    for seed in range(3):
        weight, gram = problem(20, seed)
        start = torch.randperm(20, generator=torch.Generator().manual_seed(seed))[:n_kept].sort().values
        found = swap_units(weight, gram, start, swaps=swaps, damping=1e-3)
        before, after = (error(weight, damped(gram, 1e-3), kept.tolist()) for kept in (start, found))
        assert found.tolist() == sorted(set(found.tolist()))
        assert len(found) == n_kept
        assert after <= before * (1 + 1e-9)
        again = swap_units(weight, gram, found, swaps=swaps, damping=1e-3)
        assert error(weight, damped(gram, 1e-3), again.tolist()) <= after * (1 + 1e-9)


def test_swaps_survive_dead_and_duplicated_channels() -> None:
    weight, gram = problem(12)
    gram[:, 4] = gram[4] = 0
    gram[:, 7], gram[7] = gram[:, 1].clone(), gram[1].clone()
    gram[7, 7] = gram[1, 7] = gram[7, 1] = gram[1, 1]
    found = swap_units(weight, gram, torch.tensor([1, 4, 7]), swaps=2, damping=1e-6)
    assert 4 not in found.tolist()
    assert len({1, 7} & set(found.tolist())) < 2
    assert len(swap_units(weight, torch.zeros(12, 12), torch.tensor([1, 4, 7]), swaps=2, damping=1e-6)) == 3


WORDS = ("importance=obs", "importance.damping=0.01", "allocator=uniform", "pruner.compensation=least_squares")


def layer_error(model, plan, index: int) -> float:
    """Error of block ``index``'s down_proj with the plan's neurons, refitted on the dense model's inputs."""
    view, seen = resolve(model), []
    down = view.blocks[index].ffn.output
    handle = down.register_forward_pre_hook(lambda _, args: seen.append(args[0].double().flatten(0, 1)))
    BlockDriver(view, 8).run(tokens(8))
    handle.remove()
    rows = torch.cat(seen)
    gram = rows.T @ rows / len(rows)
    return error(down.weight.detach().double(), damped(gram, 0.01), list(plan.blocks[index].ffn_kept))


def test_swaps_lower_the_error_of_every_block_at_the_same_widths() -> None:
    """From the order with the first-order term, which does not go by the error alone and so leaves room."""
    words = [*WORDS, "importance.first_order=true"]
    plain, swapped = (
        cfsp.prune(tiny_model(), tokens(8), "one_shot", 0.5, round_to=8, overrides=[*words, f"importance.swaps={n}"])
        for n in (0, 10)
    )
    assert [len(block.ffn_kept) for block in plain.blocks] == [len(block.ffn_kept) for block in swapped.blocks]
    assert plain.blocks != swapped.blocks
    gains = [layer_error(tiny_model(), plain, i) / layer_error(tiny_model(), swapped, i) for i in range(4)]
    assert min(gains) > 1 - 1e-5
    assert max(gains) > 1.001


@pytest.mark.parametrize("sequential", [False, True])
def test_swaps_go_with_heads_and_in_sequence(sequential) -> None:
    words = [*WORDS, "pruner.structure=heads_ffn", f"pruner.sequential={sequential}"]
    model, ids = tiny_model(num_attention_heads=8, num_key_value_heads=4, head_dim=4), tokens(8)
    plain, swapped = (
        cfsp.prune(
            model, ids, "one_shot", 0.4, scope="decoder", round_to=8, overrides=[*words, f"importance.swaps={n}"]
        )
        for n in (0, 10)
    )
    assert plain.achieved == swapped.achieved
    assert plain.blocks != swapped.blocks
    for one, other in zip(plain.blocks, swapped.blocks, strict=True):
        assert len(one.kv_groups_kept or ()) == len(other.kv_groups_kept or ())


def test_a_metric_that_returns_another_number_of_units_is_named(monkeypatch) -> None:
    monkeypatch.setattr(Obs, "improve_kept", lambda self, channels, activation, kept: kept[1:])
    with pytest.raises(RunError, match="importance=obs: improve_kept returns 47 units of block 0's ffn, and .* 48;"):
        cfsp.prune(tiny_model(), tokens(4), "one_shot", 0.5, round_to=8, overrides=[*WORDS, "importance.swaps=1"])
