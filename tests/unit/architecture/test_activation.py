"""What a review of the Gauss-Newton refit found: each test fails without its fix."""

from __future__ import annotations

import copy

import pytest
import torch

import cfsp
from cfsp.plan.pruning_plan import PruningPlan
from tests.helpers.tiny import tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("architecture", ["llama", "llama_bias"])
def test_training_the_pruned_model_leaves_the_tensors_of_its_plan_alone(architecture, tmp_path) -> None:
    """The model folder of a recovered model holds the plan too, which must be one that can be read."""
    model = tiny_model(architecture)
    plan = cfsp.prune(model, tokens(), "cfsp_plus", 0.5, overrides=["pruner.newton_steps=1", "pruner.cg_iterations=2"])
    assert plan.tensors
    pruned = cfsp.apply(copy.deepcopy(model), plan)
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter += 1.0
    read = PruningPlan.load(plan.save(tmp_path / "plan.json"))
    assert read.tensors.keys() == plan.tensors.keys()


def test_no_token_held_out_leaves_the_least_squares() -> None:
    model, ids = tiny_model(), tokens(1, 24)
    few = ["calibration.gram_share=0.05"]  # two tokens
    plan = cfsp.prune(model, ids, "cfsp_plus", 0.5, overrides=few)
    plain = cfsp.prune(model, ids, "cfsp_plus", 0.5, overrides=[*few, "pruner.compensation=least_squares"])
    assert plan.notes["least_squares_alone"] == [index for index, block in enumerate(plan.blocks) if block.ffn_kept]
    assert plan.tensors.keys() == plain.tensors.keys()
    for name, tensor in plain.tensors.items():
        assert torch.equal(plan.tensors[name], tensor)


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


@pytest.mark.parametrize("words", [[], ["calibration.skip_documents=0"]])
def test_runs_from_before_documents_could_be_skipped_keep_their_identity(words) -> None:
    from cfsp.calibration.calibration_set import identity
    from cfsp.config.compose import compose
    from cfsp.config.parse import parse

    assert "skip_documents" not in identity(parse(compose(words)).calibration)
    assert identity(parse(compose(["calibration.skip_documents=1"])).calibration)["skip_documents"] == 1


def test_an_evaluated_text_keeps_its_identity_too() -> None:
    from cfsp.config.sections import TextSection
    from cfsp.data.text import locate_text

    path = "pkg://cfsp/assets/text/evaluation.txt"
    assert "skip_documents" not in locate_text(TextSection(path=path), "text").identity
    assert locate_text(TextSection(path=path, skip_documents=2), "text").identity["skip_documents"] == 2
