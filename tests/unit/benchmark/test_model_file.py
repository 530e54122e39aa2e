"""The benchmark of a model file: both ratios are those of their own times, and a missed limit is an exit code."""

from __future__ import annotations

import json

import pytest

from cfsp.benchmark import calibration, model_file
from cfsp.system.package import ROOT

WORDS = ["--model", str(ROOT / "assets" / "books7m"), "--windows", "2", "--seq-len", "32", "--repeats", "2"]


@pytest.fixture
def places(tmp_path, one_thread):
    return ["--work", str(tmp_path / "work"), "--results", str(tmp_path)]


@pytest.mark.parametrize(("limit", "exit_code"), [(1e9, 0), (0.0, 1)])
def test_both_ratios_stand_in_the_record_and_a_missed_limit_is_an_exit_code(
    limit, exit_code, places, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(calibration, "LIMIT", limit)
    monkeypatch.setattr(model_file, "PERPLEXITY_LIMIT", limit)
    assert model_file.main([*WORDS, *places]) == exit_code
    record = json.loads((tmp_path / "benchmarks" / "model_file_books7m.json").read_text())
    prune, perplexity = record["rows"]
    assert (prune["what"], perplexity["what"]) == ("prune", "perplexity")
    assert prune["lm_head_calls"] == 0
    for row in record["rows"]:
        assert row["ratios"] == [a / b for a, b in zip(row["seconds"]["ours"], row["seconds"]["bare"], strict=True)]
        assert min(row["ratios"]) <= row["ratio"] <= max(row["ratios"])
    # The logits of one window, float32: 32 tokens and 4,096 entries.
    assert min(perplexity["peak_bytes"].values()) >= 32 * 4096 * 4
    table = (tmp_path / "tables" / "benchmark_model_file_books7m.md").read_text()
    assert ("**MISSED**" in table) == bool(exit_code)
    assert "| perplexity, float32, cpu | 2 x 32 |" in table
    assert table in capsys.readouterr().out


def test_a_model_that_is_not_there_ends_in_one_line(places, capsys):
    assert model_file.main(["--model", "absent/model.gguf", *places]) == 2
    assert capsys.readouterr().err.count("\n") == 1
