"""The activation of an FFN: identified from the first tokens of a batch, or not taken."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import cfsp
from cfsp.architecture.activation import activation_of
from cfsp.architecture.ffn import ffn_of
from cfsp.architecture.views import resolve
from cfsp.calibration.ffn_pairs import capturing_ffn
from tests.helpers.architectures import ARCHITECTURES
from tests.helpers.tensors import close, normal
from tests.helpers.tiny import tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

DENSE = [name for name, entry in ARCHITECTURES.items() if entry.experts is None]


class Inner(nn.Module):
    """A gated FFN in which something else happens: a factor, or a norm before down_proj."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(6, 11, bias=False), nn.Linear(6, 11, bias=False)
        self.down_proj, self.act_fn = nn.Linear(11, 6, bias=False), nn.SiLU()
        self.norm, self.what = nn.LayerNorm(11), what

    def hidden(self, x: Tensor) -> Tensor:
        made = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        match self.what:
            case "factor":
                return 1.5 * made
            case "norm":
                return self.norm(made)
            case "swapped":
                return self.act_fn(self.up_proj(x)) * self.gate_proj(x)
        return made

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.hidden(x))


class Learnt(nn.Module):
    """An activation that has a parameter, which no plan holds."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(x) * self.slope


def first_seen(model) -> tuple:
    block = resolve(model).blocks[0]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    with torch.no_grad(), capturing_ffn(block, block.ffn) as seen:
        model(tokens(2, 12, vocabulary=vocabulary))
    return block.ffn, seen.entering.flatten(0, 1), seen.hidden.flatten(0, 1)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["module", "configuration"])
def test_the_activation_is_found(name, dtype, where) -> None:
    from transformers.activations import ACT2FN

    model = tiny_model(hidden_act=name).to(dtype)
    ffn, x, hidden = first_seen(model)
    if where == "configuration":  # as in an FFN that calls a function by its name
        del ffn.module.act_fn
    found = activation_of(model, ffn, x, hidden)
    values = torch.linspace(-4, 4, 99)
    if dtype == torch.float32:
        close(found(values), ACT2FN[name](values))
    else:  # what rounds alike is alike
        assert float((found(values) - ACT2FN[name](values)).abs().max()) < 0.03
    assert activation_of(model, ffn, x, 1.2 * hidden) is None
    assert activation_of(model, ffn, x, torch.full_like(hidden, math.nan)) is None


@pytest.mark.parametrize("what", ["factor", "norm", "swapped"])
def test_an_ffn_of_another_form_has_none(what) -> None:
    torch.manual_seed(0)
    module, plain, x = Inner(what), Inner(""), normal(20, 6)
    model = tiny_model()
    with torch.no_grad():
        assert activation_of(model, ffn_of(module), x, module.hidden(x)) is None
        found = activation_of(model, ffn_of(plain), x, plain.hidden(x))
    assert found is plain.act_fn


def test_an_activation_with_a_parameter_is_not_taken() -> None:
    module, model, x = Inner(""), tiny_model(), normal(20, 6)
    module.act_fn = Learnt()
    with torch.no_grad():
        assert activation_of(model, ffn_of(module), x, module.hidden(x)) is None


@pytest.mark.parametrize("name", DENSE)
def test_every_architecture_has_an_activation(name) -> None:
    model = ARCHITECTURES[name].build()
    ffn, x, hidden = first_seen(model)
    with torch.no_grad():
        assert activation_of(model, ffn, x, hidden) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_activation_that_is_only_near_is_not_taken(dtype) -> None:
    """Apertus learns two numbers of its activation; that with the usual ones is off by a few per cent."""
    model = tiny_model("apertus", blocks=3).to(dtype)
    few = ["pruner.newton_steps=1", "pruner.cg_iterations=2"]
    plan = cfsp.prune(model, tokens(16, 24), "cfsp_plus", 0.5, round_to=8, overrides=few)
    assert plan.notes["least_squares_alone"] == [index for index, block in enumerate(plan.blocks) if block.ffn_kept]
    assert "gauss_newton" not in plan.notes


def test_an_activation_is_seen_beside_a_token_with_huge_values() -> None:
    """The first token of many models is one: what differs elsewhere is little beside it."""
    from cfsp.architecture.activation import activation_of
    from cfsp.architecture.views import resolve

    model = tiny_model(hidden_act="silu")
    ffn = resolve(model).blocks[0].ffn
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[0] *= 1000
    gate, up = (projection.weight.detach().float() for projection in ffn.inputs.values())

    def hidden(act):
        return act(x.float() @ gate.T) * (x.float() @ up.T)

    assert activation_of(model, ffn, x, hidden(torch.nn.functional.silu).bfloat16()) is not None
    assert activation_of(model, ffn, x, hidden(torch.nn.functional.mish).bfloat16()) is None
