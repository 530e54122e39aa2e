"""What each metric depends on, and what it is worth on a hand-made block."""

from __future__ import annotations

import copy

import pytest
import torch

from cfsp.architecture.views import resolve
from cfsp.calibration.calibrate import calibrate
from cfsp.calibration.calibration_set import CalibrationSet
from cfsp.errors import RunError
from cfsp.importance.activation_norm import ActivationNorm
from cfsp.importance.base import Activation, score
from cfsp.importance.cfsp import Cfsp
from cfsp.importance.cfsp_released import CfspReleased
from cfsp.importance.flap import Flap
from cfsp.importance.magnitude import Magnitude
from cfsp.importance.random import RandomImportance
from cfsp.importance.sequence_norm import SequenceNorm
from cfsp.importance.wanda import Wanda
from cfsp.model.driver import BlockDriver
from tests.helpers.tiny import tiny_model, tokens

WEIGHT_FREE = ("three_w_one_wa", "three_w_one_a", "one_wa", "one_a")


def calibrated(model):
    view = resolve(model)
    statistics, _ = calibrate(BlockDriver(view, 8), CalibrationSet(tokens(), "random", "", 0))
    return view, statistics


def activation(inputs) -> Activation:
    return Activation(*(v.float() for v in (inputs.rms, inputs.mean, inputs.variance, inputs.mean_norm)))


def rankings(model, statistics, metric):
    scores = score(resolve(model), statistics, metric)
    return [values.argsort(stable=True).tolist() for values in scores.neurons]


def reweighted(model):
    """Each neuron's three weight vectors times a random factor: same activations on paper, other weights."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in other.model.layers:
            for linear, axis in ((layer.mlp.gate_proj, 0), (layer.mlp.up_proj, 0), (layer.mlp.down_proj, 1)):
                factor = torch.exp(torch.randn(96, generator=generator))
                linear.weight *= factor.unsqueeze(1 - axis)
    return other


@pytest.mark.parametrize(
    ("metric", "changes"),
    [
        *((CfspReleased(variant), False) for variant in WEIGHT_FREE),
        (ActivationNorm(), False),
        (RandomImportance(0), False),
        (CfspReleased("wanda_base"), True),
        (CfspReleased("mag_base"), True),
        (Cfsp(), True),
        (Wanda(), True),
        (Magnitude(), True),
        (SequenceNorm(), False),
        (Flap("wifv"), True),
        (Flap("ifv"), False),
        (Flap("wifn"), True),
    ],
    ids=lambda value: value if isinstance(value, bool) else getattr(value, "variant", type(value).__name__),
)
def test_rankings_depend_on_weights_or_not(metric, changes):
    """The same statistics, other weights: `cfsp` must change its ranking, the released variants cannot."""
    model = tiny_model()
    _, statistics = calibrated(model)
    same = rankings(model, statistics, metric) == rankings(reweighted(model), statistics, metric)
    assert same is not changes


@pytest.mark.parametrize("variant", WEIGHT_FREE)
def test_released_variants_are_what_the_released_normalisation_gives(variant):
    """Written out as the released code computes it: each |W| divided by its own neuron's sum, then averaged."""
    view, statistics = calibrated(tiny_model())
    for block, found in zip(view.blocks, statistics.blocks, strict=True):
        gate, up, down = (weight.abs().double() for weight in block.ffn.weights())
        x = found.ffn.rms
        weighted = down * x if variant.endswith("wa") else down
        metric = weighted / weighted.sum(0)
        if variant.startswith("three"):
            metric = metric + up.T / up.T.sum(0) + gate.T / gate.T.sum(0)
        expected = (metric * x ** (0.5 if variant == "one_a" else 1.0)).mean(0)
        ours = CfspReleased(variant).score(block.channels["ffn"], activation(found.ffn)).double()
        assert torch.allclose(ours, expected, rtol=1e-5)


def test_cfsp_is_equation_8_term_by_term():
    view, statistics = calibrated(tiny_model())
    block, x = view.blocks[1], statistics.blocks[1].ffn.rms
    gate, up, down = (weight.abs().double() for weight in block.ffn.weights())
    expected = torch.zeros(96, dtype=torch.float64)
    for i in range(96):
        share = sum(down[j, i] * x[i] / (down[j] * x).sum() for j in range(32))
        share += sum(up[i, j] / up[:, j].sum() for j in range(32)) + sum(
            gate[i, j] / gate[:, j].sum() for j in range(32)
        )
        expected[i] = share * x[i] / x.sum()
    ours = Cfsp().score(block.channels["ffn"], activation(statistics.blocks[1].ffn)).double()
    assert torch.allclose(ours, expected, rtol=1e-4)


def test_a_dead_column_counts_as_zero_not_nan():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, 3] = 0
        model.model.layers[0].mlp.down_proj.weight[5, :] = 0
    view, statistics = calibrated(model)
    assert all(values.isfinite().all() for values in score(view, statistics, Cfsp()).neurons)


def test_a_score_that_is_not_finite_names_the_block():
    view, statistics = calibrated(tiny_model())
    with torch.no_grad():
        view.blocks[2].ffn.output.weight[0, 0] = float("nan")
    with pytest.raises(RunError, match="block 2.*importance=wanda"):
        score(view, statistics, Wanda())


def test_random_follows_its_seed():
    view, statistics = calibrated(tiny_model())
    one, same, other = (score(view, statistics, RandomImportance(seed)).neurons for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[0], one[1]), "blocks must not share one draw"


@pytest.mark.parametrize("variant", ["wifv", "ifv", "wifn"])
def test_flap_is_its_definition_on_raw_activations(variant):
    """Variance over all tokens, from the activations themselves; heads squared as the released code does."""
    model, ids = tiny_model(), tokens()
    view, statistics = calibrated(model)
    block = view.blocks[1]
    for kind, linear in (("ffn", block.ffn.output), ("attention", block.attention.o_proj)):
        seen = []
        handle = linear.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            model(ids)
        handle.remove()
        x, weight = seen[0].double(), linear.weight.detach().double()
        expected = {
            "wifv": x.var(0, unbiased=False) * weight.square().sum(0),
            "ifv": x.var(0, unbiased=False),
            "wifn": weight.abs().mean(0) * x.square().mean(0).sqrt(),
        }[variant]
        expected = expected.square() if kind == "attention" else expected
        found = getattr(statistics.blocks[1], kind)
        ours = Flap(variant).score(block.channels[kind], activation(found)).double()
        assert torch.allclose(ours, expected, rtol=1e-4)


def test_the_channels_of_heads_lie_in_the_order_of_their_groups():
    """Every metric scores heads through these; k and v are repeated as the attention repeats them."""
    model = tiny_model()
    attention = resolve(model).blocks[0].attention
    q, k, v, o = attention.weights()
    module = model.model.layers[0].self_attn
    assert (attention.n_heads, attention.n_kv_heads, attention.head_dim) == (4, 2, 8)
    for head in range(4):
        rows, read = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
        assert torch.equal(q[rows], module.q_proj.weight[rows])
        assert torch.equal(k[rows], module.k_proj.weight[read])
        assert torch.equal(v[rows], module.v_proj.weight[read])
        assert torch.equal(o[:, rows], module.o_proj.weight[:, rows])
