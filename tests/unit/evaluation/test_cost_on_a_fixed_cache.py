"""Decoding is timed on a cache of fixed length, and computes what decoding on a growing one does."""

from __future__ import annotations

import contextlib

import pytest
import torch
from rich.console import Console

import cfsp
from cfsp.evaluation import cost
from cfsp.evaluation.base import Side
from cfsp.evaluation.cost import Cost, time_generation
from cfsp.plan.pruning_plan import BlockPlan, PruningPlan
from cfsp.record.run_record import RunRecord
from cfsp.tables.summary import summary_table
from tests.helpers.tiny import tiny_model, tokens

SOME = tuple(range(0, 96, 3))
PRUNED = (BlockPlan(SOME), BlockPlan(attention=False), BlockPlan(None, (1,)), BlockPlan(ffn=False))


def decoded(model, prompt, monkeypatch, *, static: bool):
    """The logits of every decoding step, and which cache it was."""
    seen = []
    handle = model.register_forward_hook(lambda *call: seen.append(call[-1].logits[:, -1]))
    with monkeypatch.context() as patch:
        if not static:
            patch.setattr(cost, "_static_cache", lambda *_: None)
        cache = time_generation(model, prompt, 6).cache
    handle.remove()
    return torch.cat(seen), cache


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma2"])
@pytest.mark.parametrize("pruned", [False, True])
def test_a_static_cache_decodes_what_a_growing_one_does(monkeypatch, architecture, pruned):
    model = tiny_model(architecture)
    if pruned:
        cfsp.apply(model, PruningPlan("m", "f", {}, PRUNED, {}, {}))
    fixed, kind = decoded(model, tokens(1, 12), monkeypatch, static=True)
    grown, other = decoded(model, tokens(1, 12), monkeypatch, static=False)
    assert (kind, other) == ("static", "dynamic")
    assert torch.allclose(fixed, grown, atol=1e-4)


def test_every_step_reads_keys_of_one_length(monkeypatch):
    lengths, attention = [], torch.nn.functional.scaled_dot_product_attention

    def seen(query, key, *args, **kwargs):
        lengths.append(key.shape[2])
        return attention(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    time_generation(tiny_model(), tokens(1, 12), 5)
    assert set(lengths) == {12, 17}


def test_a_window_shorter_than_the_prompt_falls_back_to_a_growing_cache():
    model = tiny_model("mistral", sliding_window=8)
    assert time_generation(model, tokens(1, 12), 3).cache == "dynamic"
    assert time_generation(model, tokens(1, 6), 3).cache == "static"


def test_speeds_state_their_spread_and_the_table_shows_it():
    sides = [Side(name, contextlib.nullcontext, torch.float32) for name in ("dense", "pruned")]
    found = Cost(prompt_tokens=16, new_tokens=4, repeats=3).measure_sides(tiny_model(), sides)
    for measurements in found.values():
        for row in (m for m in measurements if m.metric == "tokens_per_second"):
            spread, tokens_timed = row.detail["spread"], row.seq_len
            assert spread["min"] <= row.value <= spread["max"]
            assert spread["max"] == tokens_timed / min(row.detail["seconds"])
            assert row.detail.get("cache") == ("static" if row.task == "decode" else None)

    def row(value, low, high):
        detail = None if low is None else {"spread": {"min": low, "max": high}}
        return {
            "suite": "cost", "task": "prefill", "metric": "tokens_per_second", "value": value, "detail": detail,
        }  # fmt: skip

    rows = {"dense": [row(10_294, 9_876, 10_301)], "pruned": [row(13_793, 13_790, 13_801)]}
    shown = table(RunRecord("id", model={"name": "m"}, method={"name": "cfsp"}, measurements=rows))
    assert [" ".join(line.replace("│", " ").split()) for line in shown if "lowest" in line] == [
        "lowest to highest 9,876 to 10,301 13,790 to 13,801"
    ]
    old = {"dense": [row(10_294, None, None)], "pruned": [row(13_793, None, None)]}
    assert not any("lowest" in line for line in table(RunRecord("id", model={"name": "m"}, measurements=old)))


def table(record: RunRecord) -> list[str]:
    console = Console(width=100, highlight=False)
    with console.capture() as captured:
        console.print(summary_table(record))
    return captured.get().splitlines()
