"""The ridge that held-out tokens choose, against residuals of the data; and refits that end when they overfit."""

from __future__ import annotations

import math

import pytest
import torch

import cfsp
from cfsp.architecture.views import resolve
from cfsp.calibration.gram import CrossSums, Gram, GramSums
from cfsp.calibration.gram_store import OnDisk
from cfsp.pruner import sequential
from cfsp.pruner.least_squares import chosen_ridge, refit
from cfsp.pruner.ridge_path import RIDGES, NormalEquations, choose_ridge
from tests.helpers.tiny import tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

K, D = 24, 6


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def equations(x: torch.Tensor, target: torch.Tensor) -> NormalEquations:
    return NormalEquations(x.T @ x / len(x), x.T @ target / len(x))


@pytest.mark.parametrize("noise", [0.01, 1.0, 10.0])
def test_the_path_has_the_held_out_errors_of_direct_solutions(noise):
    true = torch.randn(K, D, dtype=torch.float64, generator=generator(0))
    x = torch.randn(60, K, dtype=torch.float64, generator=generator(1))
    target = x @ true + noise * torch.randn(60, D, dtype=torch.float64, generator=generator(2))
    fitted, held_out = equations(x[:40], target[:40]), equations(x[40:], target[40:])
    scale = float(fitted.system.diagonal().mean())
    ridge, errors = choose_ridge(fitted, held_out, scale)
    expected = []
    for strength in RIDGES:
        solution = torch.linalg.solve(
            fitted.system + strength * scale * torch.eye(K, dtype=torch.float64), fitted.right
        )
        residual = (target[40:] - x[40:] @ solution).square().sum() - target[40:].square().sum()
        expected.append(float(residual) / 20)
    assert errors == pytest.approx(expected, rel=1e-9)
    assert ridge == RIDGES[min(range(len(RIDGES)), key=lambda index: expected[index])]


def test_targets_that_the_inputs_do_not_tell_leave_the_weights_as_they_are():
    """A target that changes its sign on the held-out tokens: every solution makes them worse."""
    x = torch.randn(64, K, dtype=torch.float64, generator=generator(0))
    target = x @ torch.randn(K, D, dtype=torch.float64, generator=generator(1))
    ridge, errors = choose_ridge(equations(x, target), equations(x, -target), 1.0)
    assert ridge is None
    assert min(errors) > 0


def test_more_noise_asks_for_a_stronger_ridge():
    chosen = []
    for noise in (0.01, 3.0, 30.0):
        x = torch.randn(400, K, dtype=torch.float64, generator=generator(3))
        target = x @ torch.randn(K, D, dtype=torch.float64, generator=generator(4))
        target += noise * torch.randn(400, D, dtype=torch.float64, generator=generator(5))
        chosen.append(choose_ridge(equations(x[:40], target[:40]), equations(x[40:], target[40:]), 1.0)[0])
    assert chosen == sorted(chosen, key=lambda ridge: math.inf if ridge is None else ridge)
    assert chosen[0] < 0.1 < (chosen[-1] or math.inf)


@pytest.mark.parametrize("unit", ["sequences", "tokens"])
@pytest.mark.parametrize("batches", [(8,), (3, 3, 2), (1,) * 8])
def test_moments_of_every_fourth_row_are_kept_apart_whatever_the_batches_are(unit, batches):
    values = torch.randn(8, 6, 10, generator=generator(0)) + 0.5
    whole, sums = GramSums(10, torch.device("cpu"), 2), GramSums(10, torch.device("cpu"), 2, unit)
    for batch in values.split(batches):
        whole(torch.nn.Identity(), (batch,))
        sums(torch.nn.Identity(), (batch,))
    rows = values[:, ::2]
    flat = rows.flatten(0, 1)
    which = torch.arange(8 if unit == "sequences" else 24) % 4 == 3
    held, fitted = (rows[which].flatten(0, 1), rows[~which].flatten(0, 1)) if unit == "sequences" else (
        flat[which], flat[~which],
    )  # fmt: skip
    gram, plain = sums.report(), whole.report()
    assert gram.tokens == plain.tokens == 24
    assert torch.allclose(gram.matrix, plain.matrix, atol=1e-6)
    assert torch.allclose(gram.mean, plain.mean, atol=1e-6)
    assert gram.held_out is not None
    assert gram.held_out.tokens == 6
    for part, expected in ((gram.held_out, held), (gram.fitted(), fitted)):
        assert torch.allclose(part.matrix.double(), (expected.T @ expected / len(expected)).double(), atol=1e-5)
        assert torch.allclose(part.mean.double(), expected.mean(0).double(), atol=1e-5)


def test_cross_moments_are_kept_apart_in_the_same_way():
    model = tiny_model()
    channels = resolve(model).blocks[0].channels["ffn"]
    entering, missing = torch.randn(8, 6, channels.n), torch.randn(8, 6, 32)
    sums = CrossSums(channels, 1, "sequences")
    for x, e in zip(entering.split(3), missing.split(3), strict=True):
        sums.add(x, e)
    which = torch.arange(8) % 4 == 3
    for part, mask in zip(sums.report_parts(), (~which, which), strict=True):
        x, e = entering[mask].flatten(0, 1), missing[mask].flatten(0, 1)
        assert torch.allclose(part, x.T @ e / len(x), atol=1e-4)
    x, e = entering.flatten(0, 1), missing.flatten(0, 1)
    assert torch.allclose(sums.report(), x.T @ e / len(x), atol=1e-4)


@pytest.mark.parametrize("centred", [False, True])
def test_the_ridge_of_a_projection_is_the_best_on_the_rows_that_are_held_out(centred):
    """Each strength is tried on the data, with the bias that the fitted rows give where there is one."""
    n, kept = 20, torch.tensor([0, 1, 3, 4, 7, 9, 12, 13, 18])
    hidden = torch.randn(8, 10, 8, dtype=torch.float64, generator=generator(0))
    x = hidden @ torch.randn(8, n, dtype=torch.float64, generator=generator(2)) + torch.arange(n) / 10
    x = x + torch.randn(8, 10, n, dtype=torch.float64, generator=generator(3))
    weight = torch.randn(5, n, dtype=torch.float64, generator=generator(1))
    sums = GramSums(n, torch.device("cpu"), 1, "sequences")
    sums(torch.nn.Identity(), (x,))
    which = torch.arange(8) % 4 == 3
    fitted, held = x[~which].flatten(0, 1), x[which].flatten(0, 1)
    mean = fitted.mean(0) if centred else torch.zeros(n, dtype=torch.float64)
    gram = (fitted - mean).T @ (fitted - mean) / len(fitted)

    def error(columns: torch.Tensor) -> float:
        lost = weight @ mean - columns @ mean[kept]
        return float((held @ weight.T - held[:, kept] @ columns.T - lost).square().sum())

    errors = [error(refit(weight, gram, kept, ridge)) for ridge in RIDGES]
    assert min(errors) < error(weight[:, kept])
    ridge = chosen_ridge(weight, sums.report(), kept, centred=centred)
    assert ridge == RIDGES[min(range(len(RIDGES)), key=lambda index: errors[index])]


def test_held_out_moments_come_back_from_disk(tmp_path):
    held = Gram(torch.eye(3), torch.ones(3), 5)
    OnDisk(tmp_path).keep(0, {"ffn": Gram(2 * torch.eye(3), torch.zeros(3), 20, held), "attention": held})
    gram = OnDisk(tmp_path).read(0, "ffn")
    assert gram.held_out is not None
    assert torch.equal(gram.held_out.matrix, held.matrix)
    assert (gram.tokens, gram.held_out.tokens) == (20, 5)
    assert OnDisk(tmp_path).read(0, "attention").held_out is None


@pytest.mark.parametrize("more", [[], ["pruner.sequential=true"]], ids=["at once", "in sequence"])
@pytest.mark.parametrize("architecture", ["llama", "llama_bias", "qwen2"])
def test_a_plan_states_the_ridge_of_each_block_and_is_the_same_again(architecture, more):
    model, ids = tiny_model(architecture), tokens(8)
    words = ["pruner.compensation=least_squares", "pruner.ridge=auto", "allocator=uniform", *more]
    plans = [cfsp.prune(model, ids, ratio=0.5, round_to=8, overrides=words) for _ in range(2)]
    assert plans[0] == plans[1]
    chosen = plans[0].notes["chosen_ridge"]["ffn"]
    assert list(chosen) == ["0", "1", "2", "3"]
    assert set(chosen.values()) <= {*RIDGES, None}
    before = model(ids).logits
    cfsp.apply(model, plans[0])
    assert not torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("n", [1, 3, 4])
def test_few_sequences_are_enough(n):
    words = ["pruner.compensation=least_squares", "pruner.ridge=auto", "allocator=uniform"]
    plan = cfsp.prune(tiny_model(), tokens(n), ratio=0.5, round_to=8, overrides=words)
    assert len(plan.notes["chosen_ridge"]["ffn"]) == 4


NEWTON = ["pruner.compensation=gauss_newton", "pruner.sequential=true", "allocator=uniform"]


@pytest.mark.parametrize("ridge", ["0.001", "auto"])
def test_refits_end_after_three_blocks_in_a_row_that_overfit(ridge, monkeypatch, caplog):
    tried = []

    def refused(block, *_, **__):
        tried.append(block)
        return {}, [1.0, 2.0]

    monkeypatch.setattr(sequential, "refit_ffn", refused)
    model, ids = tiny_model(blocks=6), tokens(8)
    # With auto, the correction of a block that is tried does without the held-out tokens, so there is none here.
    words = [f"pruner.ridge={ridge}", *(["pruner.correction=0"] if ridge == "auto" else [])]
    plan = cfsp.prune(model, ids, ratio=0.5, round_to=8, overrides=[*NEWTON, *words])
    assert tried == [0, 1, 2]
    assert plan.notes["gauss_newton_ended_after"] == 2
    assert sum("in a row" in record.message for record in caplog.records) == 1
    # What is refused leaves the closed form, fitted to all tokens: as if it had never been tried.
    least_squares = ["pruner.compensation=least_squares", *NEWTON[1:], *words]
    expected = cfsp.prune(model, ids, ratio=0.5, round_to=8, overrides=least_squares)
    assert plan.blocks == expected.blocks
    assert plan.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(plan.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_a_block_that_gains_between_two_that_do_not_goes_on(monkeypatch):
    tried = []

    def every_third(block, *_, **__):
        tried.append(block)
        return {}, [1.0, 0.5 if block % 3 == 2 else 2.0]

    monkeypatch.setattr(sequential, "refit_ffn", every_third)
    plan = cfsp.prune(tiny_model(blocks=6), tokens(8), ratio=0.5, round_to=8, overrides=NEWTON)
    assert tried == [0, 1, 2, 3, 4, 5]
    assert "gauss_newton_ended_after" not in plan.notes


def test_with_auto_the_start_of_a_refit_has_not_seen_the_tokens_that_judge_it(monkeypatch):
    """Other tokens in the held-out sequences leave the start of the first block as it is, at one fixed ridge."""
    starts = []

    def keep(block, ffn, *_, **__):
        starts.append((block, ffn.output.weight.detach().clone()))
        return {}, [1.0, 2.0]

    monkeypatch.setattr(sequential, "refit_ffn", keep)
    monkeypatch.setattr("cfsp.pruner.least_squares.chosen_ridge", lambda *_, **__: 0.01)
    model, ids = tiny_model(blocks=2), tokens(8)
    other = ids.clone()
    other[3], other[7] = tokens(8, seed=5)[3], tokens(8, seed=6)[7]
    for windows in (ids, other):
        words = [*NEWTON, "pruner.ridge=auto", "pruner.correction=0", "importance=magnitude"]
        cfsp.prune(model, windows, ratio=0.5, round_to=8, overrides=words)
    (_, first), _, (_, second), _ = starts
    # Moments of all tokens less those of the held-out ones, in float32: 1e-5 is some twenty roundings.
    assert torch.allclose(first, second, atol=1e-5)


def test_few_tokens_for_each_neuron_are_said_before_the_work_starts(caplog):
    cfsp.prune(tiny_model(), tokens(4), ratio=0.5, round_to=8, overrides=NEWTON)
    assert any("to fit for each of 96 neurons" in record.message for record in caplog.records)


@pytest.mark.parametrize("value", ["-1", "none", "[1]", "inf"])
def test_another_ridge_is_refused_by_its_key(value, refused):
    (line,) = refused("pruner.compensation=least_squares", f"pruner.ridge={value}")
    assert line.startswith("pruner.ridge=")
    assert "auto" in line
