"""Compensation by least squares, second-order selection and allocation by error, against their own definitions."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

import cfsp
from cfsp.allocate.budget import Budget, Sizes
from cfsp.allocate.reconstruction import Reconstruction
from cfsp.allocate.search import Search
from cfsp.calibrate.gram import Gram, GramCollection, GramSums, GramWanted, InMemory, OnDisk, gram_sums
from cfsp.importance.base import Scores
from cfsp.importance.second_order import removal_order, scores_of
from cfsp.models.driver import BlockDriver
from cfsp.models.views import resolve
from cfsp.pruning.least_squares import corrected, least_squares_compensation, refit, solve
from cfsp.pruning.plan import BlockPlan, PruningPlan
from tests.tiny import ARCHITECTURES, tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(tokens: int, n: int, condition: float = 10.0, seed: int = 0) -> torch.Tensor:
    """X [tokens, n] fp64 whose Gram matrix has about the given condition number."""
    x = torch.randn(tokens, n, dtype=torch.float64, generator=generator(seed))
    mix = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator(seed + 1)))[0]
    return x @ (mix * torch.logspace(0, -math.log10(condition) / 2, n, dtype=torch.float64)) @ mix.T


def error(x: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor, fitted: torch.Tensor) -> float:
    return float((x @ weight.T - x[:, kept] @ fitted.T).square().sum() / len(x))


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e6])
@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-2])
def test_refit_solves_the_normal_equations(condition, ridge) -> None:
    """Against numpy's least squares on the stacked problem, not on the Gram matrix."""
    import numpy as np

    x, weight = inputs(200, 24, condition), torch.randn(8, 24, dtype=torch.float64, generator=generator(3))
    gram = x.T @ x / len(x)
    kept = torch.tensor([0, 2, 3, 7, 8, 9, 15, 16, 20, 23])
    fitted = refit(weight, gram, kept, ridge)
    damping = ridge * float(gram.diagonal().mean())
    design = torch.cat([x[:, kept] / len(x) ** 0.5, damping**0.5 * torch.eye(len(kept), dtype=torch.float64)])
    target = torch.cat([x @ weight.T / len(x) ** 0.5, damping**0.5 * weight[:, kept].T])
    expected = torch.from_numpy(np.linalg.lstsq(design.numpy(), target.numpy(), rcond=None)[0]).T
    torch.testing.assert_close(fitted, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_nothing_removed_changes_nothing() -> None:
    x, weight = inputs(50, 12), torch.randn(4, 12, dtype=torch.float64, generator=generator(1))
    assert torch.equal(refit(weight, x.T @ x / 50, torch.arange(12), 1e-3), weight)


@pytest.mark.parametrize("n_tokens", [4, 11, 200], ids=["rank 4", "rank 11", "full rank"])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0])
def test_the_refitted_error_is_never_above_the_plain_one(n_tokens, ridge) -> None:
    """Fewer tokens than neurons, duplicated and dead neurons too; everything stays finite."""
    x = inputs(n_tokens, 24)
    x[:, 5] = x[:, 2]
    x[:, [9, 10]] = 0
    weight, gram = torch.randn(8, 24, dtype=torch.float64, generator=generator(2)), x.T @ x / n_tokens
    for seed in range(5):
        kept = torch.randperm(24, generator=generator(seed))[:12].sort().values
        fitted = refit(weight, gram, kept, ridge)
        assert fitted.isfinite().all()
        assert error(x, weight, kept, fitted) <= error(x, weight, kept, weight[:, kept]) * (1 + 1e-9) + 1e-12


def test_a_hopeless_system_stays_finite() -> None:
    right = torch.ones(3, 2, dtype=torch.float64)
    assert solve(torch.zeros(3, 3, dtype=torch.float64), right, 0.0).isfinite().all()
    assert not solve(torch.full((3, 3), float("nan"), dtype=torch.float64), right, 0.0).any()


def test_the_correction_gives_what_is_missing() -> None:
    x, weight = inputs(300, 16), torch.randn(6, 16, dtype=torch.float64, generator=generator(4))
    change = torch.randn(6, 16, dtype=torch.float64, generator=generator(5))
    gram, cross = x.T @ x / 300, x.T @ (x @ change.T) / 300
    torch.testing.assert_close(corrected(weight, gram, cross, 0.5, 0.0), weight + 0.5 * change, atol=1e-8, rtol=1e-8)


# Second-order selection


def exhaustive(x: torch.Tensor, weight: torch.Tensor, damping: float) -> tuple[list[int], list[float]]:
    """Greedy removal with a least-squares fit of every candidate, from the definition."""
    n, gram = weight.shape[1], x.T @ x / len(x)
    level = damping * float(gram.diagonal().mean())
    full = gram + level * torch.eye(n, dtype=torch.float64)

    def cost(kept: list[int]) -> float:
        change = torch.zeros_like(weight)
        gone = [i for i in range(n) if i not in kept]
        change[:, gone] = -weight[:, gone]
        if kept:
            change[:, kept] = torch.linalg.solve(full[kept][:, kept], full[kept][:, gone] @ weight[:, gone].T).T
        return float((change @ full @ change.T).trace())

    left, order, costs = list(range(n)), [], [0.0]
    while left:
        values = {j: cost([i for i in left if i != j]) for j in left}
        best = min(left, key=lambda j: values[j])
        left.remove(best)
        order.append(best)
        costs.append(values[best])
    return order, [after - before for before, after in itertools.pairwise(costs)]


def test_removal_is_the_exact_greedy_one() -> None:
    x, weight = inputs(60, 10), torch.randn(5, 10, dtype=torch.float64, generator=generator(6))
    order, increments = removal_order(weight, x.T @ x / 60, damping=1e-2)
    expected_order, expected = exhaustive(x, weight, 1e-2)
    assert order.tolist() == expected_order
    torch.testing.assert_close(increments, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("step", [2, 5])
def test_steps_of_several_end_at_the_same_total(step) -> None:
    x, weight = inputs(80, 20), torch.randn(5, 20, dtype=torch.float64, generator=generator(7))
    gram = x.T @ x / 80
    order, increments = removal_order(weight, gram, damping=1e-2, step=step)
    assert sorted(order.tolist()) == list(range(20))
    level = 1e-2 * float(gram.diagonal().mean())
    total = float((weight @ (gram + level * torch.eye(20, dtype=torch.float64)) @ weight.T).trace())
    assert float(increments.sum()) == pytest.approx(total, rel=1e-9)
    exact = removal_order(weight, gram, damping=1e-2)[1].cumsum(0)[9]
    assert increments.cumsum(0)[9] >= exact * (1 - 1e-9) or step == 1


def test_dead_and_duplicated_channels_go_first() -> None:
    x = inputs(100, 12)
    x[:, 4] = 0
    x[:, 7] = x[:, 1]
    weight = torch.randn(6, 12, dtype=torch.float64, generator=generator(8))
    order, increments = removal_order(weight, x.T @ x / 100, damping=1e-6)
    assert 4 in order[:2].tolist()
    assert {1, 7} & set(order[:2].tolist())
    assert float(increments[:2].sum()) < 1e-3 * float(increments.sum())


def test_groups_of_channels_go_together() -> None:
    x, weight = inputs(80, 12), torch.randn(5, 12, dtype=torch.float64, generator=generator(9))
    order, increments = removal_order(weight, x.T @ x / 80, damping=1e-2, unit=4)
    assert sorted(order.tolist()) == [0, 1, 2]
    gram = x.T @ x / 80 + 1e-2 * float((x.T @ x / 80).diagonal().mean()) * torch.eye(12, dtype=torch.float64)
    assert float(increments.sum()) == pytest.approx(float((weight @ gram @ weight.T).trace()), rel=1e-9)


def test_scores_keep_order_and_totals() -> None:
    order, increments = torch.tensor([3, 0, 2, 1]), torch.tensor([1.0, 4.0, 2.0, 9.0], dtype=torch.float64)
    scores = scores_of(order, increments)
    assert scores.argsort().tolist() == order.tolist()
    assert float(scores[order][:3].sum()) == pytest.approx(7.0)


def test_a_score_that_reads_weights_and_inputs_changes_with_both() -> None:
    x, weight = inputs(100, 12), torch.randn(6, 12, dtype=torch.float64, generator=generator(10))
    gram = x.T @ x / 100
    first = scores_of(*removal_order(weight, gram))
    assert not torch.equal(first.argsort(), scores_of(*removal_order(weight.flip(1), gram)).argsort())
    assert not torch.equal(first.argsort(), scores_of(*removal_order(weight, gram.flip(0).flip(1))).argsort())


# Gram matrices


def test_gram_matrices_are_those_of_the_inputs() -> None:
    model, ids = tiny_model(), tokens(6)
    view, seen = resolve(model), []
    down = view.blocks[1].ffn.output
    handle = down.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    wanted = GramWanted(("ffn", "attention"), 0.25, 2**40)
    with gram_sums(view.blocks, wanted) as sums:
        BlockDriver(view, 2).run(ids)
    handle.remove()
    rows = torch.cat([batch[:, ::4].flatten(0, 1) for batch in seen])
    found = sums[1]["ffn"].report()
    assert found.tokens == len(rows) == 6 * 8
    torch.testing.assert_close(found.matrix.double(), rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mean.double(), rows.mean(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.matrix, found.matrix.T)
    assert not down._forward_pre_hooks


def test_wide_matrices_are_summed_panel_by_panel() -> None:
    sums = GramSums(1100, torch.device("cpu"), 1)
    x = torch.randn(2, 5, 1100, generator=generator(11))
    sums(None, (x,))
    rows = x.flatten(0, 1)
    torch.testing.assert_close(sums.report().matrix, rows.T @ rows / 10, rtol=1e-4, atol=1e-5)


def test_matrices_on_disk_come_back_and_damage_is_seen(tmp_path) -> None:
    store = OnDisk(tmp_path / "gram")
    gram = Gram(torch.randn(4, 4), torch.randn(4), 7)
    assert not store.has(0, ["ffn"])
    store.keep(0, {"ffn": gram})
    found = store.read(0, "ffn")
    assert torch.equal(found.matrix, gram.matrix)
    assert torch.equal(found.mean, gram.mean)
    assert found.tokens == 7
    assert store.has(0, ["ffn"])
    assert not store.has(0, ["ffn", "attention"])
    (file,) = (tmp_path / "gram" / "0").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:40])
    assert not store.has(0, ["ffn"])


def test_what_does_not_fit_is_collected_block_by_block_with_the_same_result(tmp_path) -> None:
    from cfsp.calibrate.calibrate import calibrate
    from cfsp.data.calibration import CalibrationSet

    model, given = tiny_model(), CalibrationSet(tokens(6), "random", "", 0)
    view = resolve(model)
    found = []
    for limit in (2**40, 0):
        collection = GramCollection(view.blocks, GramWanted(("ffn",), 1.0, limit), tmp_path / str(limit))
        assert collection.fits == bool(limit)
        statistics, _ = calibrate(BlockDriver(view, 2), given, None, None, collection)
        assert collection.complete
        found.append((statistics, [collection.matrices.read(block, "ffn").matrix for block in range(4)]))
    assert found[0][0].distance("angular").tolist() == found[1][0].distance("angular").tolist()
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))


# Plans


LEAST_SQUARES = ["pruner.compensation=least_squares"]


@pytest.mark.parametrize("importance", ["cfsp", "obs", "flap", "magnitude"])
@pytest.mark.parametrize("sequential", [False, True])
def test_a_compensated_block_gives_more_of_its_output_back(importance, sequential) -> None:
    ids = tokens(16)
    settings = [f"importance={importance}", "allocator=uniform", f"pruner.sequential={sequential}"]
    losses = []
    for compensation in ("none", "least_squares"):
        model = tiny_model()
        dense = model(ids).logits.detach()
        plan = cfsp.prune(
            model, ids, "one_shot", 0.5, round_to=8, overrides=[*settings, f"pruner.compensation={compensation}"]
        )
        with torch.no_grad():
            losses.append(float((cfsp.apply(model, plan)(ids).logits - dense).square().mean()))
    assert losses[1] < losses[0]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "llama_bias"])
@pytest.mark.parametrize("structure", ["ffn", "heads", "heads_ffn"])
@pytest.mark.parametrize("sequential", [False, True])
def test_plans_with_refitted_weights_replay_save_and_reload(architecture, structure, sequential, tmp_path) -> None:
    from cfsp.models.checkpoint import save_checkpoint

    model, ids = tiny_model(architecture), tokens(8)
    words = [*LEAST_SQUARES, f"pruner.structure={structure}", f"pruner.sequential={sequential}"]
    ratio = 0.1 if structure == "heads" else 0.4
    plan = cfsp.prune(
        model, ids, "one_shot", ratio, scope="ffn" if structure == "ffn" else "decoder", round_to=8,
        overrides=[*words, "importance=obs", "allocator=uniform"],
    )  # fmt: skip
    assert plan.tensors
    assert plan.achieved["added_parameters"] == 0
    read = PruningPlan.load(plan.save(tmp_path / "plan.json"))
    assert read == plan
    assert all(torch.equal(read.tensors[name], value) for name, value in plan.tensors.items())
    cfsp.apply(model, plan)
    again = cfsp.apply(tiny_model(architecture), read)
    save_checkpoint(model, tmp_path / "model")
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(again(ids).logits, logits)
        assert torch.equal(loaded(ids).logits, logits)
    assert logits.isfinite().all()


def test_pruning_a_refitted_model_again_composes_the_plans() -> None:
    ids = tokens(8)
    model = tiny_model()
    words = [*LEAST_SQUARES, "importance=obs", "allocator=uniform", "pruner.structure=heads_ffn"]
    first = cfsp.prune(model, ids, "one_shot", 0.3, scope="decoder", round_to=8, overrides=words)
    cfsp.apply(model, first)
    second = cfsp.prune(model, ids, "cfsp", 0.3, round_to=8, overrides=["allocator=uniform"])
    cfsp.apply(model, second)
    composed = cfsp.apply(tiny_model(), second.compose(first))
    with torch.no_grad():
        torch.testing.assert_close(composed(ids).logits, model(ids).logits)


def test_a_native_bias_takes_the_mean() -> None:
    """With a bias of its own, the output keeps its mean exactly, whatever goes."""
    model, ids = tiny_model("llama_bias"), tokens(8)
    view = resolve(model)
    with gram_sums(view.blocks, GramWanted(("ffn",), 1.0, 2**40)) as sums:
        BlockDriver(view, 4).run(ids)
    store = InMemory()
    for at, of_block in enumerate(sums):
        store.keep(at, {kind: found.report() for kind, found in of_block.items()})
    block, kept = view.blocks[0], tuple(range(0, 96, 2))
    tensors = least_squares_compensation(block, BlockPlan(kept), store, 1e-3)
    mean = store.read(0, "ffn").mean
    down = block.ffn.output
    before = down.weight @ mean + down.bias
    after = tensors["blocks.0.ffn.weight"] @ mean[list(kept)] + tensors["blocks.0.ffn.bias"]
    torch.testing.assert_close(after, before.detach(), atol=1e-4, rtol=1e-4)


# Allocation


def sizes(*widths: int) -> Sizes:
    return Sizes(widths, (3,) * len(widths), (0,) * len(widths), (0,) * len(widths), 3 * sum(widths), 0, 0)


def test_reconstruction_minimises_the_total_error() -> None:
    """Against all ways to spread the budget over two blocks."""
    errors = [torch.rand(10, dtype=torch.float64, generator=generator(s)) * scale for s, scale in ((1, 1.0), (2, 3.0))]
    empty = torch.zeros(0, 1, dtype=torch.float64)
    scores = Scores(tuple(errors), (empty, empty), {"mse": torch.ones(2, dtype=torch.float64)})
    allocation = Reconstruction().allocate(scores, sizes(10, 10), 0.5)
    kept = [round(share * 10) for share in allocation.keep.tolist()]
    assert sum(kept) == 10

    def total(first: int) -> float:
        parts = [values.sort(descending=True).values for values in errors]
        return float(parts[0][first:].sum() + parts[1][10 - first :].sum())

    assert total(kept[0]) == pytest.approx(min(total(first) for first in range(11)))


def test_search_finds_a_better_allocation_within_its_budget() -> None:
    legal = [list(range(8, 97, 8))] * 4
    best = (24, 72, 40, 56)
    asked = []

    def loss(widths: tuple[int, ...]) -> float:
        asked.append(widths)
        return sum((w - b) ** 2 for w, b in zip(widths, best, strict=True))

    start = (48, 48, 48, 48)
    found, history = Search(["uniform"], evaluations=200).search([start], legal, (3,) * 4, loss)
    assert found == best
    assert len(asked) == len(set(asked)) <= 200
    assert [row["nll"] for row in history] == sorted((row["nll"] for row in history), reverse=True)
    few, _ = Search(["uniform"], evaluations=3).search([start], legal, (3,) * 4, loss)
    assert sum(few) == sum(start)


def test_search_runs_in_a_model_and_leaves_it(tmp_path, run_cfsp, prose_file) -> None:
    words = [
        "calibration=text", f"calibration.path={prose_file}", "calibration.n_samples=6", "calibration.seq_len=32",
        "evaluation=none", "pruner=one_shot", "importance=obs", "pruner.compensation=least_squares",
        "allocator=search", "allocator.evaluations=20", "save.model=false",
    ]  # fmt: skip
    code, _, err = run_cfsp(*words)
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["plan"]["achieved"]["ratio"] == pytest.approx(0.5, abs=0.01)
    kept = list((tmp_path / "cache" / "search").glob("*.json"))
    assert len(kept) == 1
    before = kept[0].stat().st_mtime_ns
    assert run_cfsp(*words, f"paths.output_dir={tmp_path / 'again'}")[0] == 0
    assert kept[0].stat().st_mtime_ns == before  # nothing was measured twice
    assert json.loads((tmp_path / "again" / "plan.json").read_text()) == json.loads(
        (tmp_path / "out" / "plan.json").read_text()
    )


def test_search_needs_the_model_in_memory(run_cfsp, prose_file) -> None:
    code, _, err = run_cfsp(
        "pruner=one_shot", "allocator=search", "model.streaming=on", "evaluation=none", "calibration=text",
        f"calibration.path={prose_file}", "calibration.n_samples=4", "calibration.seq_len=32",
    )  # fmt: skip
    assert code == 2
    assert "allocator=search" in err


def test_the_ratio_is_met_whatever_is_refitted() -> None:
    for ratio in (0.2, 0.35, 0.5):
        plan = cfsp.prune(tiny_model(), tokens(8), "one_shot", ratio, round_to=8, overrides=[*LEAST_SQUARES])
        assert abs(plan.achieved["ratio"] - ratio) <= 8 / (4 * 96) / 2 + 1e-9
    assert Budget(0.5).round_to == 32
