"""The Gauss-Newton refit in plans: what it is fitted to; what replays and composes; what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor

import cfsp
from cfsp.architecture.ffn import ffn_of
from cfsp.architecture.views import resolve
from cfsp.checkpoint.save import save_checkpoint
from cfsp.config.compose import compose
from cfsp.config.identity import method_of
from cfsp.config.parse import parse
from cfsp.errors import ConfigError, UnsupportedModelError
from cfsp.model.driver import BlockDriver
from cfsp.plan.pruning_plan import PruningPlan
from cfsp.pruner.sequential import _adds_as_it_is
from tests.helpers.architectures import ARCHITECTURES, VOCABULARY
from tests.helpers.tensors import normal, rows
from tests.helpers.tiny import ARCHITECTURES as TINY
from tests.helpers.tiny import tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

DENSE = [name for name, entry in ARCHITECTURES.items() if entry.experts is None]
LEAST_SQUARES = ["pruner.compensation=least_squares"]
#: Blocks whose FFN's output meets a norm or a factor before it is added.
SHIFTED = {"gemma2", "gemma3", "olmo2", "granite", "glm4", "opt_350m"}


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


# What comes after an FFN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DENSE)
def test_whether_an_ffn_adds_its_output_as_it_is(name, dtype) -> None:
    model = ARCHITECTURES[name].build().to(dtype)
    ids = tokens(4, 16, vocabulary=VOCABULARY)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for step in BlockDriver(resolve(model), 2).steps(ids):
        assert _adds_as_it_is(step, step.block.ffn) == (name not in SHIFTED)
        assert not step.block.ffn.output.module._forward_hooks
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("factor", [1.0, 0.5, 1.1])
def test_a_factor_of_the_residual_is_seen(factor) -> None:
    from dataclasses import replace

    entry = ARCHITECTURES["granite"]
    model = replace(entry, settings={**entry.settings, "residual_multiplier": factor}).build()
    for step in BlockDriver(resolve(model), 2).steps(tokens(4, 16, vocabulary=VOCABULARY)):
        assert _adds_as_it_is(step, step.block.ffn) == (factor == 1.0)


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "granite", "llama"])
def test_where_it_does_not_the_blocks_before_are_not_made_up_for(name) -> None:
    ids = tokens(8, 16, vocabulary=VOCABULARY)
    plans = [
        cfsp.prune(ARCHITECTURES[name].build(), ids, "cfsp_plus", 0.5, round_to=4, overrides=[f"pruner.correction={c}"])
        for c in (0.0, 1.0)
    ]
    alike = all(torch.equal(value, plans[1].tensors[key]) for key, value in plans[0].tensors.items())
    assert alike == (name in SHIFTED)


def test_targets_hold_the_share_of_what_the_blocks_before_changed(monkeypatch) -> None:
    """Of block 1: block 0 has nothing before it, so what enters block 1 is the same whatever the share."""
    from cfsp.model.block_calls import output_hidden
    from cfsp.plan.slice_block import slice_block
    from cfsp.pruner import sequential as in_sequence

    ids, targets = tokens(8), {}
    for share in (0.0, 0.25, 1.0):
        seen: dict[int, Tensor] = {}

        def refit(block, ffn, pairs, activation, *, seen=seen, **settings):
            seen[block] = torch.cat([rows(pairs.fitted, 1), rows(pairs.held_out, 1)])
            return {}, [1.0]

        monkeypatch.setattr(in_sequence, "refit_ffn", refit)
        words = ["allocator=uniform", f"pruner.correction={share}"]
        plan = cfsp.prune(tiny_model(), ids, "cfsp_plus", 0.5, round_to=8, batch_size=8, overrides=words)
        targets[share] = seen[1]
    leaving, pruned = [], tiny_model()
    slice_block(resolve(pruned).blocks[0], plan.blocks[0], plan.tensors)
    for model in (tiny_model(), pruned):
        model.model.layers[1].register_forward_hook(lambda _, args, output: leaving.append(output_hidden(output)))
        with torch.no_grad():
            model(ids)
    out = torch.arange(8) % 4 == 3
    missing = leaving[0] - leaving[1]
    missing = torch.cat([missing[~out], missing[out]]).flatten(0, 1)
    assert float(missing.abs().max()) > 0.01
    for share, found in targets.items():
        torch.testing.assert_close(found - targets[0.0], share * missing, rtol=1e-3, atol=1e-4)


# Plans


def calibration(vocabulary: int = VOCABULARY, n: int = 64) -> Tensor:
    """Enough that what the steps learn holds on other tokens."""
    return tokens(n, 48, seed=1, vocabulary=vocabulary)


def built(name: str):
    group, _, of = name.partition(" ")
    return tiny_model(of) if group == "tiny" else ARCHITECTURES[of].build()


EVERY = [*(f"tiny {name}" for name in (*TINY, "llama_bias")), *(f"any {name}" for name in DENSE)]


@pytest.mark.parametrize("name", EVERY)
def test_plans_replay_save_and_reload_and_come_closer_than_least_squares(name, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = built(name)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    # With fewer tokens the step of these two is learnt by heart, and held-out tokens refuse it.
    n = 96 if name in ("any qwen3", "any olmo2") else 64
    ids, prompt = calibration(vocabulary, n), tokens(3, 12, seed=2, vocabulary=vocabulary)
    before, modules = {key: value.clone() for key, value in model.state_dict().items()}, [*model.modules()]
    with torch.no_grad():
        dense = model(ids).logits
    plan = cfsp.prune(model, ids, "cfsp_plus", 0.5, round_to=4)
    other = cfsp.prune(model, ids, "cfsp_plus", 0.5, round_to=4, overrides=LEAST_SQUARES)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(one is another for one, another in zip(model.modules(), modules, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)

    gated = resolve(model).blocks[0].ffn.kind == "gated"
    kinds = {key.split(".", 2)[2] for key in plan.tensors}
    assert kinds - {"ffn.bias"} == {"ffn.weight", "ffn.up_weight"} | ({"ffn.gate_weight"} if gated else set())
    assert "least_squares_alone" not in plan.notes
    moved = {int(key.split(".")[1]) for key in plan.tensors if key.endswith("up_weight")}
    errors = plan.notes["gauss_newton"]
    assert moved == {int(block) for block, of_block in errors.items() if min(of_block) < of_block[0]}
    for index, decision in enumerate(plan.blocks):
        if index in moved:
            kept, ffn = len(decision.ffn_kept), resolve(model).blocks[index].ffn
            assert plan.tensors[f"blocks.{index}.ffn.up_weight"].shape == (kept, ffn.output.out_features)
            assert plan.tensors[f"blocks.{index}.ffn.weight"].shape == (ffn.output.out_features, kept)
            row = ffn.inputs["up"].weight[list(decision.ffn_kept)]
            assert not torch.equal(plan.tensors[f"blocks.{index}.ffn.up_weight"], row)
    assert abs(plan.achieved["ratio"] - 0.5) <= 4 / (2 * sum(block.ffn.width for block in resolve(model).blocks)) + 1e-9
    assert plan.achieved["ratio"] == other.achieved["ratio"]
    assert plan.achieved["added_parameters"] == other.achieved["added_parameters"] == 0

    read = PruningPlan.load(plan.save(tmp_path / "plan.json"))
    assert read == plan
    assert read.tensors.keys() == plan.tensors.keys()
    assert all(torch.equal(read.tensors[key], value) for key, value in plan.tensors.items())

    first, again = cfsp.apply(model, plan), cfsp.apply(built(name), read)
    for key, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    save_checkpoint(first, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        logits = first(prompt).logits
        assert torch.equal(again(prompt).logits, logits)
        assert torch.equal(loaded(prompt).logits, logits)
        losses = [
            float((pruned(ids).logits - dense).square().mean()) for pruned in (first, cfsp.apply(built(name), other))
        ]
    assert losses[0] < 0.99 * losses[1]


def test_rows_of_a_fused_matrix_and_its_biases_go_where_they_belong() -> None:
    """By slice_block alone: the halves of gate_up_proj, Conv1D's transposed matrix, and untouched biases."""
    from cfsp.plan.pruning_plan import BlockPlan, tensor_name
    from cfsp.plan.slice_block import slice_block

    for name in ("phi3", "gpt2", "llama_bias", "opt"):
        block = resolve(ARCHITECTURES[name].build()).blocks[1]
        ffn, kept = block.ffn, (0, 3, 4, 40, 87)
        biases = {key: None if one.bias is None else one.bias[list(kept)].clone() for key, one in ffn.inputs.items()}
        before = {key: one.weight[list(kept)].clone() for key, one in ffn.inputs.items()}
        given = {key: normal(5, 48, seed=at) for at, key in enumerate(ffn.inputs)}
        down = normal(48, 5, seed=9)
        for replaced in (tuple(given), ("up",)):
            block = resolve(ARCHITECTURES[name].build()).blocks[1]
            tensors = {tensor_name(1, "ffn", f"{key}_weight"): given[key] for key in replaced}
            slice_block(block, BlockPlan(kept), {**tensors, tensor_name(1, "ffn", "weight"): down})
            now = ffn_of(block.ffn.module)
            for key, projection in now.inputs.items():
                assert torch.equal(projection.weight, given[key] if key in replaced else before[key])
                assert (projection.bias is None) == (biases[key] is None)
                assert biases[key] is None or torch.equal(projection.bias, biases[key])
            assert torch.equal(now.output.weight, down)


def test_tensors_of_the_plan_are_not_the_models() -> None:
    model = tiny_model()
    plan = cfsp.prune(model, calibration(128), "cfsp_plus", 0.5, round_to=8)
    before = {key: value.clone() for key, value in plan.tensors.items()}
    cfsp.apply(model, plan)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate_proj" in name or "up_proj" in name:
                parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in plan.tensors.items())


def test_an_ffn_of_another_form_gets_least_squares_alone(caplog) -> None:
    """Here a factor after the activation's product; the plan says so, and is that of least squares."""
    model, ids = tiny_model(), tokens(8)

    def scaled(self, x):
        return self.down_proj(1.5 * self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    mlp = model.model.layers[2].mlp
    mlp.forward = scaled.__get__(mlp)
    words = ["allocator=uniform", "pruner.newton_steps=1"]
    plan = cfsp.prune(model, ids, "cfsp_plus", 0.5, round_to=8, overrides=words)
    assert plan.notes["least_squares_alone"] == [2]
    assert plan.notes["gauss_newton"].keys() == {"0", "1", "3"}
    assert "least squares alone" in caplog.text
    assert "blocks.2.ffn.weight" in plan.tensors
    assert "blocks.2.ffn.up_weight" not in plan.tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precisions_are_refitted_in_single_and_kept_low(dtype) -> None:
    model = tiny_model().to(dtype)
    ids = calibration(128)
    with torch.no_grad():
        dense = model(ids).logits.float()
    plans = [cfsp.prune(model, ids, "cfsp_plus", 0.5, round_to=8, overrides=more) for more in ([], LEAST_SQUARES)]
    assert any(name.endswith("gate_weight") for name in plans[0].tensors)
    assert {value.dtype for value in plans[0].tensors.values()} == {dtype}
    losses = []
    for plan in plans:
        with torch.no_grad():
            pruned = cfsp.apply(tiny_model().to(dtype), plan)
            losses.append(float((pruned(ids).logits.float() - dense).square().mean()))
    assert losses[0] < losses[1]


def test_protected_and_whole_blocks_are_left_alone() -> None:
    words = ["sparsity.protect=[1,1]"]
    plan = cfsp.prune(tiny_model(), calibration(128), "cfsp_plus", 0.3, round_to=8, overrides=words)
    assert plan.notes["gauss_newton"].keys() == {"1", "2"}
    assert {name.split(".")[1] for name in plan.tensors} == {"1", "2"}


def test_heads_and_neurons_together() -> None:
    words = ["pruner.structure=heads_ffn"]
    ids = calibration(128)
    plan = cfsp.prune(tiny_model(), ids, "cfsp_plus", 0.4, scope="decoder", round_to=8, overrides=words)
    kinds = {name.split(".", 2)[2] for name in plan.tensors}
    assert {"ffn.gate_weight", "ffn.weight"} <= kinds
    one, two = cfsp.apply(tiny_model(), plan), cfsp.apply(tiny_model(), plan)
    with torch.no_grad():
        assert torch.equal(one(ids[:4]).logits, two(ids[:4]).logits)


@pytest.mark.parametrize(("n", "length"), [(1, 1), (1, 3), (2, 2), (3, 1), (4, 1), (5, 3)])
def test_a_handful_of_tokens_is_enough_to_run(n, length) -> None:
    plan = cfsp.prune(tiny_model(), tokens(n, length), "cfsp_plus", 0.5, round_to=8)
    assert all(value.isfinite().all() for value in plan.tensors.values())
    assert ("least_squares_alone" in plan.notes) == (n < 4 and n * length < 4)
    json.loads(plan.to_json(), parse_constant=pytest.fail)


def test_settings_reach_the_refit(monkeypatch) -> None:
    from cfsp.pruner import ffn_refit

    asked = []
    monkeypatch.setattr(
        ffn_refit, "gauss_newton", lambda *args, **settings: (asked.append(settings), (args[1], [1.0]))[1]
    )
    words = ["allocator=uniform", "pruner.newton_steps=5", "pruner.cg_iterations=7", "pruner.ridge=0.25"]
    plan = cfsp.prune(tiny_model(), tokens(8), "cfsp_plus", 0.5, round_to=8, overrides=words)
    assert asked == [{"steps": 5, "cg_iterations": 7, "damping": 0.25}] * 4
    assert not any("up_weight" in name for name in plan.tensors)
    assert plan.notes["gauss_newton"] == {str(block): [1.0] for block in range(4)}


# Composition


@pytest.mark.parametrize("name", ["tiny llama", "any phi3", "any gpt2", "any opt"])
@pytest.mark.parametrize("second", ["cfsp", "cfsp_plus"])
def test_pruning_a_refitted_model_again_composes_the_plans(name, second) -> None:
    model = built(name)
    ids = calibration(model.get_input_embeddings().weight.shape[0])
    first = cfsp.prune(model, ids, "cfsp_plus", 0.4, round_to=4)
    cfsp.apply(model, first)
    then = cfsp.prune(model, ids, second, 0.4, round_to=4)
    assert any(decision.ffn_kept for decision in then.blocks)
    cfsp.apply(model, then)
    composed = then.compose(first)
    assert composed.compensation
    again = cfsp.apply(built(name), composed)
    with torch.no_grad():
        assert torch.equal(again(ids[:4]).logits, model(ids[:4]).logits)


def test_an_ffn_that_goes_later_takes_its_tensors_along() -> None:
    model, ids = tiny_model(), calibration(128)
    first = cfsp.prune(model, ids, "cfsp_plus", 0.5, round_to=8, overrides=["allocator=uniform"])
    assert {int(name.split(".")[1]) for name in first.tensors} == {0, 1, 2, 3}
    assert any("gate" in name for name in first.tensors)
    cfsp.apply(model, first)
    then = cfsp.prune(model, ids, "shortgpt", 0.25, scope="decoder")
    gone = [index for index, decision in enumerate(then.blocks) if not decision.keeps_block]
    assert gone
    cfsp.apply(model, then)
    composed = then.compose(first)
    assert {int(name.split(".")[1]) for name in composed.tensors} == {0, 1, 2, 3} - set(gone)
    with torch.no_grad():
        assert torch.equal(cfsp.apply(tiny_model(), composed)(ids[:4]).logits, model(ids[:4]).logits)


# Refusals and identity


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pruner.sequential=false"], "pruner.sequential=true"),
        (["pruner.structure=heads"], "pruner.compensation=least_squares"),
        (["pruner.structure=experts"], "pruner.compensation=none"),
        (["pruner.newton_steps=0"], "pruner.newton_steps"),
        (["pruner.cg_iterations=0"], "pruner.cg_iterations"),
        (["pruner.ridge=-1"], "pruner.ridge"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_with_what_to_do(words, said) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(compose(["pruner=cfsp_plus", *words]))
    assert said in str(refused.value)
    assert words[0].split("=")[0].removeprefix("pruner.") in str(refused.value)


def test_a_mixture_of_experts_is_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"compensation=gauss_newton.*mixture of experts.*compensation=least_squares"
    ):
        cfsp.prune(ARCHITECTURES["mixtral"].build(), tokens(4, vocabulary=VOCABULARY), "cfsp_plus", 0.5, round_to=8)


def test_steps_are_part_of_the_method_only_where_they_are_taken() -> None:
    def settings(*words: str) -> dict:
        return method_of(parse(compose(["pruner=cfsp_plus", *words])))["pruner"]

    newton = settings()
    assert {"newton_steps": 2, "cg_iterations": 20, "ridge": 1e-3, "correction": 0.5}.items() <= newton.items()
    assert settings("pruner.newton_steps=3") != newton != settings("pruner.cg_iterations=21")
    assert settings("pruner.ridge=0.01") != newton != settings("pruner.correction=0")
    assert settings(*LEAST_SQUARES) == settings(*LEAST_SQUARES, "pruner.newton_steps=3", "pruner.cg_iterations=9")
    assert not {"newton_steps", "cg_iterations"} & settings(*LEAST_SQUARES).keys()
    none = settings("pruner.compensation=none")
    assert not {"newton_steps", "cg_iterations", "ridge", "correction"} & none.keys()
