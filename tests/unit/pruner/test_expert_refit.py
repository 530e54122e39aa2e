"""Gram matrices of experts, second-order selection by them, and least squares inside each expert."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

import cfsp
from cfsp.architecture.views import resolve
from cfsp.calibration.calibrate import calibrate
from cfsp.calibration.calibration_set import from_ids
from cfsp.calibration.gram import GramRequest, expert_kind
from cfsp.calibration.gram_store import GramCollection, GramMatrices, few_token_experts, gram_bytes
from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.save import save_checkpoint
from cfsp.data.limits import Limits
from cfsp.errors import CfspError, CheckpointError, UnsupportedModelError
from cfsp.importance.base import score
from cfsp.importance.obs import Obs
from cfsp.model.driver import BlockDriver
from cfsp.plan.pruning_plan import BlockPlan, PruningPlan
from cfsp.pruner.expert_refit import expert_compensation
from tests.helpers.architectures import BLOCKS, EXPERT_WIDTH, VOCABULARY, Architecture
from tests.helpers.experts import SHORT, SPARSE, entering, expert_by_hand, logits, routed
from tests.helpers.tiny import tokens

pytestmark = pytest.mark.usefixtures("one_thread")

sparse = pytest.mark.parametrize("architecture", SPARSE.values(), ids=SPARSE)
#: Enough that nearly every expert sees more tokens than it has neurons.
LONG = tokens(8, 64, vocabulary=VOCABULARY)
WITH_REFIT = ["pruner.compensation=least_squares", "importance=obs"]
EVERYTHING = 10**12


def collected(model, request: GramRequest, folder=None, ids: Tensor = LONG) -> tuple[Statistics, GramMatrices]:
    driver = BlockDriver(resolve(model), 3)
    grams = GramCollection(driver.view.blocks, request, folder)
    return calibrate(driver, from_ids(ids, Limits(VOCABULARY, None)), grams=grams)[0], grams.matrices


def mixtures(a: Architecture, model) -> list[tuple[int, nn.Module]]:
    blocks = enumerate(a.blocks_of(model))
    return [(index, block.get_submodule(a.ffn_path)) for index, block in blocks if a.is_sparse(index)]


def rows_of(a: Architecture, model, mixture: nn.Module, expert: int) -> tuple[Tensor, Tensor, Tensor]:
    """(indices of the tokens [n], inputs of down [n, N], outputs [n, d]) of one expert, fp64, by hand."""
    states = entering(mixture, model, LONG)
    chosen, _ = routed(a, mixture, states)
    token = (chosen == expert).any(1).nonzero().flatten()
    inner, output = expert_by_hand(a, mixture, expert, states[token])
    return token, inner.detach().double(), output.detach().double()


# Gram matrices


@sparse
@torch.no_grad()
def test_the_gram_matrix_of_an_expert_is_that_of_its_tokens(architecture):
    a = architecture
    model = a.build()
    _, grams = collected(model, GramRequest(("ffn",), 1.0, EVERYTHING))
    for index, mixture in mixtures(a, model):
        for expert in range(a.experts.n):
            _, x, _ = rows_of(a, model, mixture, expert)
            found = grams.read(index, expert_kind(expert))
            assert found.tokens == len(x)
            close = {"rtol": 1e-3, "atol": 1e-4 * float(x.square().mean())}
            assert torch.allclose(found.matrix.double(), x.T @ x / max(len(x), 1), **close)
            assert torch.allclose(found.mean.double(), x.sum(0) / max(len(x), 1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "hold_out"), [("mixtral", "sequences"), ("mixtral_modules", "tokens")])
@torch.no_grad()
def test_a_share_of_the_tokens_and_those_that_are_held_out(name, hold_out):
    a = SPARSE[name]
    model = a.build()
    _, grams = collected(model, GramRequest(("ffn",), 0.5, EVERYTHING, hold_out))
    length = LONG.shape[1]
    for index, mixture in mixtures(a, model):
        for expert in range(a.experts.n):
            token, x, _ = rows_of(a, model, mixture, expert)
            taken = token % 2 == 0  # the sequences are of an even length
            place = token // length if hold_out == "sequences" else token // 2
            held_out = taken & (place % 4 == 3)
            found = grams.read(index, expert_kind(expert))
            assert found.held_out is not None
            assert (found.tokens, found.held_out.tokens) == (int(taken.sum()), int(held_out.sum()))
            for gram, rows in (
                (found, x[taken]),
                (found.held_out, x[held_out]),
                (found.fitted(), x[taken & ~held_out]),
            ):
                expected = rows.T @ rows / max(len(rows), 1)
                assert torch.allclose(gram.matrix.double(), expected, rtol=1e-3, atol=1e-4 * float(x.square().mean()))


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral_modules"])
def test_what_exceeds_the_limit_is_collected_block_by_block_and_kept_on_disk(name, tmp_path):
    a = SPARSE[name]
    model = a.build()
    view, fits = resolve(model), GramRequest(("ffn", "attention"), 1.0, EVERYTHING)
    widths = [w for b in view.blocks for w in [EXPERT_WIDTH] * a.experts.n * a.is_sparse(b.index)]
    widths += [part.n for block in view.blocks for part in block.channels.values()]
    assert gram_bytes(view.blocks, fits) == 4 * sum(width**2 for width in widths)
    small = GramRequest(("ffn", "attention"), 1.0, gram_bytes(view.blocks, fits) - 1)
    assert not GramCollection(view.blocks, small, None).fits
    _, at_once = collected(model, fits)
    _, block_by_block = collected(model, small, tmp_path / "grams")
    for index, _ in mixtures(a, model):
        assert few_token_experts(view.blocks[index], at_once) == few_token_experts(view.blocks[index], block_by_block)
        for expert in range(a.experts.n):
            one, other = (grams.read(index, expert_kind(expert)) for grams in (at_once, block_by_block))
            assert one.tokens == other.tokens
            assert torch.allclose(one.matrix, other.matrix, rtol=1e-4, atol=1e-8)
    collection = GramCollection(view.blocks, small, tmp_path / "grams")
    assert collection.complete
    (tmp_path / "grams" / "2" / "tokens.json").unlink()
    assert not collection.complete
    with pytest.raises(CfspError, match="block 2 were deleted"):
        few_token_experts(view.blocks[2], collection.matrices)


# Second-order scores


@pytest.mark.parametrize("name", ["mixtral", "mixtral_modules", "gpt_oss"])
@torch.no_grad()
def test_the_first_neuron_to_go_is_the_one_without_which_the_refitted_output_errs_least(name):
    """Each neuron is removed alone, and the others refitted by a least-squares solver on the tokens themselves."""
    a = SPARSE[name]
    model = a.build()
    statistics, grams = collected(model, GramRequest(("ffn",), 1.0, EVERYTHING))
    found = score(resolve(model), statistics, Obs(), grams=grams)
    index, mixture = mixtures(a, model)[1]
    few = few_token_experts(resolve(model).blocks[index], grams)
    for expert in set(range(a.experts.n)) - set(few):
        _, x, _ = rows_of(a, model, mixture, expert)
        weight = resolve(model).blocks[index].experts.expert(expert).output.weight.detach().double()
        damping = 1e-3 * float(x.square().sum(0).mean())
        design = torch.cat([x, damping**0.5 * torch.eye(EXPERT_WIDTH).double()])
        errors = []
        for neuron in range(EXPERT_WIDTH):
            others = [other for other in range(EXPERT_WIDTH) if other != neuron]
            target = design[:, neuron, None] * weight[:, neuron]
            fitted = torch.linalg.lstsq(design[:, others], target, driver="gelsd").solution
            errors.append(float((target - design[:, others] @ fitted).square().sum()) / LONG.numel())
        scores = found.experts[index][expert]
        assert int(scores.argmin()) == min(range(EXPERT_WIDTH), key=errors.__getitem__)
        assert float(scores.min()) == pytest.approx(min(errors), rel=1e-2)


# Refits


def kept_by(plan: PruningPlan, index: int, expert: int) -> Tensor:
    return torch.tensor(plan.blocks[index].expert_neurons_kept[expert])


@pytest.mark.parametrize("name", ["mixtral", "mixtral_modules", "deepseek_v2"])
@pytest.mark.parametrize("ridge", [0.0, 1e-2])
@torch.no_grad()
def test_each_expert_solves_the_normal_equations_of_its_tokens(name, ridge):
    """Against a least-squares solver on the stacked rows of the tokens, not on the Gram matrix."""
    a = SPARSE[name]
    model = a.build()
    _, grams = collected(model, GramRequest(("ffn",), 1.0, EVERYTHING))
    index, mixture = mixtures(a, model)[1]
    block = resolve(model).blocks[index]
    kept = tuple(tuple(range(expert % 3, EXPERT_WIDTH, 3))[:12] for expert in range(a.experts.n))
    tensors = expert_compensation(block, BlockPlan(expert_neurons_kept=kept), grams, ridge)
    found = tensors[f"blocks.{index}.experts.weight"]
    few, errors = few_token_experts(block, grams), 0
    assert len(few) < a.experts.n
    for expert, neurons in enumerate(kept):
        weight = block.experts.expert(expert).output.weight.detach().double()
        stay = weight[:, list(neurons)]
        if expert in few:
            assert torch.equal(found[expert].double(), stay)
            continue
        _, x, _ = rows_of(a, model, mixture, expert)
        damping = (ridge * float(x.square().sum(0).mean())) ** 0.5
        design = torch.cat([x[:, list(neurons)], damping * torch.eye(len(neurons)).double()])
        target = torch.cat([x @ weight.T, damping * stay.T])
        expected = torch.linalg.lstsq(design, target, driver="gelsd").solution.T
        assert torch.allclose(found[expert].double(), expected, rtol=5e-3, atol=5e-4 * float(expected.abs().max()))
        plain, fitted = (x @ weight.T - x[:, list(neurons)] @ w.T for w in (stay, found[expert].double()))
        errors += 1
        assert fitted.square().sum() < plain.square().sum()
    assert errors


@torch.no_grad()
def test_a_bias_takes_the_mean_of_each_expert():
    a = SPARSE["gpt_oss"]
    model = a.build()
    _, grams = collected(model, GramRequest(("ffn",), 1.0, EVERYTHING))
    index, mixture = mixtures(a, model)[0]
    block = resolve(model).blocks[index]
    kept = tuple(tuple(range(0, EXPERT_WIDTH, 2)) for _ in range(a.experts.n))
    tensors = expert_compensation(block, BlockPlan(expert_neurons_kept=kept), grams, 1e-3)
    weights, biases = (tensors[f"blocks.{index}.experts.{what}"] for what in ("weight", "bias"))
    for expert in set(range(a.experts.n)) - set(few_token_experts(block, grams)):
        _, x, output = rows_of(a, model, mixture, expert)
        found = x[:, list(kept[expert])] @ weights[expert].double().T + biases[expert].double()
        assert torch.allclose(found.mean(0), output.mean(0), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def masked(a: Architecture, plan: PruningPlan) -> Tensor:
    """Logits of a new dense model whose down matrices have the refitted columns where they were, and zeros beside."""
    model = a.build()
    for index, block in enumerate(resolve(model).blocks):
        decision = plan.blocks[index]
        if block.experts is None:
            if decision.ffn_kept is not None:
                wide = torch.zeros_like(block.ffn.output.weight)
                wide[:, list(decision.ffn_kept)] = plan.tensors[f"blocks.{index}.ffn.weight"]
                block.ffn.output.weight.copy_(wide)
                if block.ffn.output.bias is not None:
                    block.ffn.output.bias.copy_(plan.tensors[f"blocks.{index}.ffn.bias"])
            continue
        if decision.expert_neurons_kept is None:
            continue
        for expert in range(a.experts.n):
            output = block.experts.expert(expert).output
            wide = torch.zeros_like(output.weight)
            wide[:, kept_by(plan, index, expert)] = plan.tensors[f"blocks.{index}.experts.weight"][expert]
            output.weight.copy_(wide)
            if output.bias is not None:
                output.bias.copy_(plan.tensors[f"blocks.{index}.experts.bias"][expert])
    return logits(model, SHORT)


@pytest.mark.parametrize("name", list(SPARSE))
def test_refitted_experts_are_masked_as_sliced_saved_and_generated(name, tmp_path):
    from transformers import AutoModelForCausalLM

    a = SPARSE[name]
    model = a.build()
    before = logits(model, SHORT)
    words = [*WITH_REFIT, "pruner.sequential=true", "pruner.ridge=auto"] if name == "qwen3_moe" else WITH_REFIT
    plan = cfsp.prune(model, LONG, pruner="one_shot", ratio=0.4, round_to=8, overrides=words)
    assert torch.equal(logits(model, SHORT), before), "planning leaves the model as it was"
    assert any(".experts." in tensor for tensor in plan.tensors)
    sizes = [b.ffn.neuron_parameters * b.ffn.width for b in resolve(model).blocks]
    steps = [8 * b.ffn.neuron_parameters for b in resolve(model).blocks]
    assert abs(plan.achieved["ratio"] - 0.4) <= max(steps) / sum(sizes)
    expected = masked(a, plan)
    plan.save(tmp_path / "plan.json")
    again = PruningPlan.load(tmp_path / "plan.json")
    assert logits(cfsp.apply(a.build(), again), SHORT).equal(found := logits(cfsp.apply(model, plan), SHORT))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert sum(p.numel() for p in model.parameters()) == plan.parameters["after"]

    save_checkpoint(model, tmp_path / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    for one in (model, reloaded):  # matrix products of small sizes round by where in memory their operands lie
        for parameter in one.parameters():
            parameter.data = parameter.data.clone()
    assert torch.equal(logits(reloaded, SHORT), logits(model, SHORT))
    with torch.no_grad():
        made = reloaded.generate(
            SHORT, attention_mask=torch.ones_like(SHORT), do_sample=False, max_new_tokens=6, eos_token_id=None,
            pad_token_id=0, use_cache=True, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    full = logits(reloaded, made.sequences)[:, SHORT.shape[1] - 1 : -1]
    assert (torch.stack(made.logits, 1) - full).abs().max() <= 1e-5 * full.abs().max()


def test_search_measures_widths_of_refitted_experts():
    model = SPARSE["mixtral"].build()
    words = [*WITH_REFIT, "allocator=search", "allocator.n_samples=2"]
    plan = cfsp.prune(model, LONG, pruner="one_shot", ratio=0.4, round_to=8, overrides=words)
    assert plan.notes["search"]


# Experts with too few tokens


def rare_model():
    """GPT-OSS whose router never chooses expert 1 of block 0, and hardly chooses expert 4 of block 2."""
    model = SPARSE["gpt_oss"].build()
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[1] = -1e4
        states = entering(model.model.layers[2].mlp, model, LONG)
        router = model.model.layers[2].mlp.router
        found = states @ router.weight.T + router.bias
        others = found[:, [0, 1, 2, 3, 5]].topk(2, dim=1).values[:, 1]
        router.bias[4] -= (found[:, 4] - others).sort(descending=True).values[10]  # ten tokens choose it
    return model


@pytest.mark.parametrize("sequential", ["true", "false"])
def test_an_expert_with_few_tokens_goes_by_its_weights_and_the_plan_says_so(sequential, caplog):
    model = rare_model()
    words = [*WITH_REFIT, "allocator=uniform", f"pruner.sequential={sequential}"]
    with caplog.at_level(logging.WARNING, "cfsp"):
        plan = cfsp.prune(model, LONG, pruner="one_shot", ratio=0.4, round_to=8, overrides=words)
    few = plan.notes["few_token_experts"]
    assert 1 in few["0"]
    assert plan.notes["unseen_experts"]["0"] == [1]
    (line,) = [r.getMessage() for r in caplog.records if "too few calibration tokens" in r.getMessage()]
    assert "ranked by weights and keep their columns" in line
    if sequential == "false":
        assert 4 in few["2"]
        assert 0 < plan.details[2]["expert_tokens"][4] < EXPERT_WIDTH
    for index, experts in few.items():
        layer = model.model.layers[int(index)].mlp.experts
        for expert in experts:
            down = layer.down_proj.detach()[expert].T
            kept = kept_by(plan, int(index), expert)
            assert kept.tolist() == down.norm(dim=0).topk(len(kept)).indices.sort().values.tolist()
            assert torch.equal(plan.tensors[f"blocks.{index}.experts.weight"][expert], down[:, kept])
            assert torch.equal(plan.tensors[f"blocks.{index}.experts.bias"][expert], layer.down_proj_bias[expert])


def test_auto_notes_a_ridge_for_each_expert():
    words = [*WITH_REFIT, "allocator=uniform", "pruner.ridge=auto"]
    plan = cfsp.prune(rare_model(), LONG, pruner="one_shot", ratio=0.4, round_to=8, overrides=words)
    ridges = plan.notes["chosen_ridge"]["experts"]["0"]
    assert len(ridges) == 6
    assert ridges[1] is None
    assert any(ridge is not None for ridge in ridges)


# Plans and refusals


def test_a_later_plan_cuts_the_refitted_experts():
    a = SPARSE["mixtral"]
    model, both = a.build(), a.build()
    first = cfsp.prune(
        model, LONG, pruner="one_shot", ratio=0.3, round_to=8, overrides=[*WITH_REFIT, "allocator=uniform"]
    )
    cfsp.apply(model, first)
    width = resolve(model).widths[0]
    second = PruningPlan(
        "m", "f", {"name": "hand"},
        (BlockPlan(experts_kept=(1, 3, 4), expert_neurons_kept=(tuple(range(0, 16, 2)), tuple(range(8)),
                                                               tuple(range(width - 8, width)))),
         *[BlockPlan()] * (BLOCKS - 1)), {}, {},
    )  # fmt: skip
    cfsp.apply(model, second)
    composed = second.compose(first)
    assert composed.tensors["blocks.0.experts.weight"].shape == (3, a.hidden, 8)
    assert torch.equal(logits(cfsp.apply(both, composed), SHORT), logits(model, SHORT))


@pytest.mark.parametrize("shape", [(6, 32), (5, 32, 8), (6, 32, 9)])
def test_tensors_that_do_not_fit_the_experts_are_refused(shape):
    blocks = (BlockPlan(expert_neurons_kept=(tuple(range(8)),) * 6), *[BlockPlan()] * (BLOCKS - 1))
    tensors = {"blocks.0.experts.weight": torch.zeros(shape)}
    with pytest.raises(CheckpointError, match=r"blocks\.0\.experts\.weight has the shape"):
        cfsp.apply(SPARSE["mixtral"].build(), PruningPlan("m", "f", {"name": "hand"}, blocks, {}, {}, tensors=tensors))


def test_whole_ffns_of_mixtures_are_not_refitted():
    words = ["pruner.compensation=gauss_newton", "pruner.sequential=true"]
    with pytest.raises(UnsupportedModelError, match=r"mixture of experts; use pruner\.compensation=least_squares"):
        cfsp.prune(SPARSE["mixtral"].build(), LONG, pruner="one_shot", round_to=8, overrides=words)
