"""Searches on real models: what a candidate is measured to be, budgets, resuming, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import cfsp
from cfsp.allocator.evolution import Evolution
from cfsp.allocator.search import Search
from cfsp.architecture.views import resolve
from cfsp.errors import DataError
from cfsp.pruner import candidate_cuts
from cfsp.pruner.candidate_fitness import CandidateFitness
from cfsp.pruner.fitness_measures import _divergence, _top_entries
from tests.conftest import mentions
from tests.helpers.tiny import tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

#: Searches of a tiny model, each short.
SEARCHES = {
    "search": ["allocator=search", "allocator.evaluations=20", "allocator.n_samples=4"],
    "evolution": [
        "allocator=evolution", "allocator.generations=3", "allocator.children=6", "allocator.tokens=[32,128]",
        "allocator.survivors=[2]",
    ],
    "knapsack": ["allocator=knapsack", "allocator.rounds=2", "allocator.n_samples=4"],
}  # fmt: skip
SEARCH = ["allocator=search", "pruner.compensation=least_squares"]
LEAST_SQUARES = ["pruner.compensation=least_squares", "importance=obs"]


def measured(monkeypatch, overrides, ratio=0.5, **settings) -> dict[tuple, float]:
    """Return the fitness of each measured pair of candidate and parts (None: all)."""
    values: dict[tuple, float] = {}
    call = CandidateFitness.__call__

    def noted(self, counts, parts=None) -> float:
        values[counts, None if parts is None else tuple(parts)] = value = call(self, counts, parts)
        return value

    model, ids = tiny_model(num_key_value_heads=4), tokens(12)
    with monkeypatch.context() as patched:
        patched.setattr(CandidateFitness, "__call__", noted)
        cfsp.prune(model, ids, "one_shot", ratio, round_to=8, overrides=overrides, **settings)
    return values


@pytest.mark.parametrize("compensation", ["none", "least_squares"])
def test_the_fitness_of_widths_is_the_loss_of_the_model_with_them(monkeypatch, compensation) -> None:
    """States of blocks that did not change are used again; a loss must not depend on what was measured before."""
    words = [f"pruner.compensation={compensation}", "importance=obs", *SEARCHES["search"]]
    values = measured(monkeypatch, words)
    assert len({counts[0] for counts, _ in values}) > 1
    ids = tokens(12)
    for (counts, _), loss in values.items():
        monkeypatch.setattr(Search, "search", lambda self, *_, counts=counts: (counts, []))
        model = tiny_model(num_key_value_heads=4)
        cut = cfsp.apply(model, cfsp.prune(model, ids, "one_shot", 0.5, round_to=8, overrides=words))
        with torch.no_grad():
            logits = cut(ids[:4]).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:4, 1:].flatten())
        assert loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("structure", ["ffn", "heads", "heads_ffn"])
def test_the_fitness_of_evolution_is_the_divergence_from_the_dense_model(monkeypatch, structure) -> None:
    """FFNs and KV groups, on all parts and on some, with all entries of the distributions."""
    words = [
        *LEAST_SQUARES, *SEARCHES["evolution"], "allocator.kl_entries=10000", f"pruner.structure={structure}",
        "allocator.starts=[uniform]",
    ]  # fmt: skip
    settings = {} if structure == "ffn" else {"scope": "decoder"}
    ratio = 0.5 if structure == "ffn" else 0.1
    ids, dense = tokens(12), tiny_model(num_key_value_heads=4)
    values = measured(monkeypatch, words, ratio, **settings)
    assert any(parts is not None for _, parts in values)
    assert len({counts for counts, _ in values}) > 3
    for (counts, parts), value in list(values.items())[::5]:
        monkeypatch.setattr(Evolution, "search", lambda self, *_, counts=counts: (counts, []))
        model = tiny_model(num_key_value_heads=4)
        plan = cfsp.prune(model, ids, "one_shot", ratio, round_to=8, overrides=words, **settings)
        cut = cfsp.apply(model, plan)
        n_tokens = ids.shape[1]
        size = -(-32 // n_tokens)
        chosen = ids[: -(-128 // n_tokens)]
        if parts is not None:
            chosen = torch.cat([chosen[part * size : (part + 1) * size] for part in parts])
        with torch.no_grad():
            p, q = (one(chosen).logits.double().log_softmax(-1) for one in (dense, cut))
        # The log-probabilities of the dense model are kept in fp32, so that each distribution sums to 1 within 1e-7.
        assert value == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4, abs=3e-7)


@pytest.mark.parametrize("entries", [1, 7, 50])
def test_top_entries_and_one_for_the_rest(entries) -> None:
    """Against the definition, with all other tokens summed up to one."""
    draws = torch.Generator().manual_seed(0)
    dense, pruned = (3 * torch.randn(20, 50, generator=draws) for _ in range(2))
    p, q = dense.double().softmax(-1), pruned.double().softmax(-1)
    expected = 0.0
    for row_p, row_q in zip(p, q, strict=True):
        top = row_p.argsort(descending=True)[:entries]
        expected += float((row_p[top] * (row_p[top] / row_q[top]).log()).sum())
        if entries < 50:
            others_p, others_q = 1 - row_p[top].sum(), 1 - row_q[top].sum()
            expected += float(others_p * (others_p / others_q).log())
    assert _divergence(pruned, _top_entries(dense, entries)) == pytest.approx(expected, rel=1e-5)
    assert _divergence(dense, _top_entries(dense, entries)) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("structure", ["ffn", "heads_ffn"])
@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6])
def test_a_search_meets_the_budget_from_every_start(name, structure, ratio) -> None:
    words = [
        *SEARCHES[name], f"pruner.structure={structure}", "allocator.starts=[coarse,reconstruction,uniform]",
        "pruner.compensation=least_squares", "importance=obs",
    ]  # fmt: skip
    scope = "ffn" if structure == "ffn" else "decoder"
    plan = cfsp.prune(tiny_model(), tokens(6), "one_shot", ratio, scope=scope, round_to=8, overrides=words)
    view = resolve(tiny_model())
    size = sum(block.ffn.width * block.ffn.neuron_parameters for block in view.blocks)
    step = 8 * view.blocks[0].ffn.neuron_parameters / (size if scope == "ffn" else view.decoder_parameters)
    assert abs(plan.achieved["ratio"] - ratio) <= step / 2 + 1e-9
    history = plan.notes["search"]
    measure = "nll" if name == "search" else "kl"
    assert history[-1][measure] <= history[0][measure]
    assert history[-1]["widths"] == [row["width"] for row in plan.details]
    if structure == "heads_ffn" and name == "evolution":
        assert history[-1]["kv_groups"] == [row["kv_groups"] for row in plan.details]


def test_every_start_with_heads_is_tried(monkeypatch) -> None:
    given: list[tuple] = []
    monkeypatch.setattr(Search, "search", lambda self, space, _: (given.append(space.starts) or space.starts[0], []))
    words = [*SEARCH, "pruner.structure=heads_ffn", "allocator.starts=[coarse,reconstruction,uniform]"]
    cfsp.prune(tiny_model(), tokens(6), "cfsp_plus", 0.4, scope="decoder", round_to=8, overrides=words)
    (starts,) = given
    assert len(starts) == 3
    assert {sum(widths) for widths in starts} == {sum(starts[0])}


@pytest.mark.parametrize("name", SEARCHES)
def test_protected_blocks_take_no_part(name) -> None:
    words = [*SEARCHES[name], *LEAST_SQUARES, "sparsity.protect=[1,0]"]
    plan = cfsp.prune(tiny_model(), tokens(6), "one_shot", 0.5, round_to=8, overrides=words)
    assert plan.notes["searched_blocks"] == [1, 2, 3]
    assert plan.notes["search"][-1]["widths"] == [row["width"] for row in plan.details[1:]]
    assert plan.blocks[0].ffn_kept is None


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_leaves_the_model_as_it_was(name) -> None:
    model = tiny_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    words = [*SEARCHES[name], *LEAST_SQUARES, "pruner.structure=heads_ffn"]
    cfsp.prune(model, tokens(6), "one_shot", 0.3, scope="decoder", round_to=8, overrides=words)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert {type(block.module) for block in resolve(model).blocks} == {type(resolve(tiny_model()).blocks[0].module)}


@pytest.mark.parametrize("name", SEARCHES)
def test_windows_of_one_token_are_refused(name) -> None:
    with pytest.raises(DataError, match=f"windows of one token .* allocator={name}"):
        cfsp.prune(tiny_model(), tokens(6, 1), "one_shot", 0.5, round_to=8, overrides=SEARCHES[name])


def test_cut_submodules_are_kept_within_the_free_memory(monkeypatch) -> None:
    """Of a large model many cuts of each block would take more than the model itself."""
    held, words = [], [*SEARCHES["search"], *LEAST_SQUARES]
    cut_to = candidate_cuts.CutSubmodules._cut_to

    def counted(self, block, kind, count):
        cut = cut_to(self, block, kind, count)
        held.append(sum(map(candidate_cuts._bytes, self._kept.values())))
        return cut

    monkeypatch.setattr(candidate_cuts.CutSubmodules, "_cut_to", counted)
    plans = []
    for free in (2**40, 200_000):
        monkeypatch.setattr(candidate_cuts, "available", lambda device, free=free: free)
        held.clear()
        plans.append(cfsp.prune(tiny_model(), tokens(6), "one_shot", 0.5, round_to=8, overrides=words))
        assert max(held) <= free * candidate_cuts._SHARE_OF_MEMORY
        assert (max(held) > 50_000) == (free == 2**40)
    assert plans[0] == plans[1]


def test_hidden_states_of_the_best_candidate_are_held_within_the_free_memory(monkeypatch) -> None:
    from cfsp.pruner import candidate_fitness

    plans = []
    for free in (2**40, 0):
        monkeypatch.setattr(candidate_fitness, "available", lambda device, free=free: free)
        words = [*SEARCHES["evolution"], *LEAST_SQUARES]
        plans.append(cfsp.prune(tiny_model(), tokens(6), "one_shot", 0.5, round_to=8, overrides=words))
    assert plans[0] == plans[1]


RUN = [
    "calibration=text", "calibration.n_samples=6", "calibration.seq_len=32", "evaluation=none", "pruner=one_shot",
    *LEAST_SQUARES, "save.model=false",
]  # fmt: skip


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_is_resumed_from_its_measured_values(name, tmp_path, run_cfsp, prose_file) -> None:
    words = [*RUN, f"calibration.path={prose_file}", *SEARCHES[name]]
    code, _, err = run_cfsp(*words)
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["plan"]["achieved"]["ratio"] == pytest.approx(0.5, abs=0.01)
    kept = list((tmp_path / "cache" / "search").glob("*.json"))
    assert len(kept) == 1
    before = kept[0].stat().st_mtime_ns
    assert run_cfsp(*words, f"paths.output_dir={tmp_path / 'again'}")[0] == 0
    assert kept[0].stat().st_mtime_ns == before  # nothing was measured twice
    # Half of the values are lost, as after a kill: the search ends at the same plan.
    values = json.loads(kept[0].read_text())
    kept[0].write_text(json.dumps(dict(list(values.items())[: len(values) // 2])))
    assert run_cfsp(*words, f"paths.output_dir={tmp_path / 'third'}")[0] == 0
    plans = [json.loads((tmp_path / out / "plan.json").read_text()) for out in ("out", "again", "third")]
    assert plans[0] == plans[1] == plans[2]


@pytest.mark.slow
def test_evolution_goes_on_after_kill_9(tmp_path, prose_file) -> None:
    words = [
        *RUN, f"calibration.path={prose_file}", *SEARCHES["evolution"], "model=bundled",
        f"paths.cache_dir={tmp_path / 'cache'}", f"paths.records_dir={tmp_path / 'records'}",
    ]  # fmt: skip

    def start(out: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "cfsp.run", *words, f"paths.output_dir={tmp_path / out}"]
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})

    killed = start("out")
    while not (kept := list((tmp_path / "cache" / "search").glob("*.json"))) or len(kept[0].read_text()) < 2000:
        time.sleep(0.05)
        assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    n_measured = len(json.loads(kept[0].read_text()))
    assert start("out").wait() == 0
    assert len(json.loads(kept[0].read_text())) > n_measured
    (tmp_path / "cache").rename(tmp_path / "other")
    assert start("undisturbed").wait() == 0
    assert (tmp_path / "out" / "plan.json").read_text() == (tmp_path / "undisturbed" / "plan.json").read_text()


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_needs_the_model_in_memory(name, refused, prose_file) -> None:
    """Before the pass over the streamed model, which may take hours."""
    lines = refused(
        "pruner=one_shot", f"allocator={name}", "model.streaming=on", "evaluation=none", "calibration=text",
        f"calibration.path={prose_file}", "calibration.n_samples=4", "calibration.seq_len=32",
    )  # fmt: skip
    mentions(lines, "model.streaming=on", f"allocator={name}", "allocator=coarse", "model.streaming=off")


@pytest.mark.parametrize("structure", ["ffn", "heads_ffn"])
def test_the_ridge_of_candidates_is_chosen_once_for_each_projection(monkeypatch, structure) -> None:
    """For the start, whichever width is measured first, so that a resumed search measures the same."""
    from cfsp.pruner import least_squares

    calls = []
    choose = least_squares.choose_ridge
    monkeypatch.setattr(least_squares, "choose_ridge", lambda *given: calls.append(1) or choose(*given))
    words = [*SEARCHES["evolution"], *LEAST_SQUARES, "pruner.ridge=auto", f"pruner.structure={structure}"]
    scope = "ffn" if structure == "ffn" else "decoder"
    plan = cfsp.prune(tiny_model(), tokens(12), "one_shot", 0.4, scope=scope, round_to=8, overrides=words)
    projections = {(kind, block) for kind, by_block in plan.notes["chosen_ridge"].items() for block in by_block}
    n_blocks = len(plan.blocks)
    assert len(calls) <= len(projections) + (n_blocks if structure == "ffn" else 2 * n_blocks)
