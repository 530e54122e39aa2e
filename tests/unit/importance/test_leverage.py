"""Ridge leverage scores and the Nystroem refit, against other forms of the same equations."""

from __future__ import annotations

import pytest
import torch

import cfsp
from cfsp.architecture.views import resolve
from cfsp.importance.base import Activation
from cfsp.importance.leverage import Leverage
from cfsp.pruner.least_squares import refit
from tests.helpers.architectures import ARCHITECTURES, VOCABULARY
from tests.helpers.tiny import tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(n_tokens: int, n: int, seed: int = 0) -> torch.Tensor:
    """Inputs [n_tokens, n] that lean on each other; fp64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(n, dtype=torch.float64) + torch.randn(n, n, dtype=torch.float64, generator=generator) / 3
    return torch.randn(n_tokens, n, dtype=torch.float64, generator=generator) @ mix


def scored(x: torch.Tensor, kind: str = "ffn", **settings: float) -> torch.Tensor:
    channels = resolve(tiny_model(width=x.shape[1], blocks=1)).blocks[0].channels[kind]
    nothing = torch.zeros(x.shape[1])
    gram = x.T @ x / len(x)
    return Leverage(**settings).score(channels, Activation(nothing, nothing, nothing, nothing, gram=gram))


@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("n_tokens", [10, 200], ids=["fewer tokens than neurons", "full rank"])
def test_the_scores_are_those_of_the_kernel_form(ridge, n_tokens) -> None:
    """x_j^T (X X^T + l T I)^-1 x_j for column x_j of X: the same by the inverse of a [T, T] matrix."""
    x = inputs(n_tokens, 32)
    strength = ridge * float(x.square().mean()) * n_tokens
    kernel = torch.linalg.inv(x @ x.T + strength * torch.eye(n_tokens, dtype=torch.float64))
    torch.testing.assert_close(scored(x, ridge=ridge), (x * (kernel @ x)).sum(0), rtol=1e-7, atol=1e-10)


def test_a_neuron_that_another_gives_scores_less_and_a_dead_one_nothing() -> None:
    x = inputs(200, 16)
    x[:, 3] = 0
    alone = scored(x)
    x[:, 5] = x[:, 9]
    found = scored(x)
    assert found[3] == 0
    assert float(found[5]) == pytest.approx(float(found[9]))
    assert found[9] < 0.6 * alone[9]
    assert ((found >= 0) & (found < 1)).all()
    assert not scored(torch.zeros(10, 16)).any()


def test_least_squares_without_a_ridge_is_the_nystroem_refit() -> None:
    """W C_:K C_KK^-1."""
    x = inputs(200, 24)
    weight = torch.randn(6, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moments, kept = x.T @ x / 200, scored(x).topk(12).indices.sort().values
    expected = weight @ moments[:, kept] @ torch.linalg.inv(moments[kept][:, kept])
    torch.testing.assert_close(refit(weight, moments, kept, 0.0), expected, rtol=1e-8, atol=1e-8)


def test_neurons_are_chosen_by_the_inputs_of_down_proj_alone() -> None:
    """The neurons of a plan have the highest scores of the calibration tokens, whatever down_proj is."""
    model, ids, seen = tiny_model(), tokens(8), []
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[:, ::2] = 0
    handle = model.model.layers[3].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    plan = cfsp.prune(model, ids, "one_shot", 0.5, round_to=8, overrides=["importance=leverage", "allocator=uniform"])
    best = scored(seen[0].double().flatten(0, 1)).topk(48).indices.sort().values
    assert list(plan.blocks[3].ffn_kept) == best.tolist()


def test_each_expert_is_scored_by_its_own_tokens() -> None:
    """Every expert keeps the neurons with the highest leverage; an expert with too few tokens is named."""
    model, ids = ARCHITECTURES["mixtral"].build(), tokens(16, vocabulary=VOCABULARY)
    overrides = ["importance=leverage", "allocator=uniform"]
    plan = cfsp.prune(model, ids, "one_shot", 0.5, round_to=8, overrides=overrides)
    kept = plan.blocks[0].expert_neurons_kept
    assert kept is not None
    assert len(set(kept)) > 1
    assert len({len(neurons) for neurons in kept}) == 1
