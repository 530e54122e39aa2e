"""The benchmark of a sweep: what it measures is one load and one calibration, and its table says so."""

from __future__ import annotations

import pytest

from cfsp.benchmark import sweep as benchmark_sweep
from cfsp.record import environment


def test_twelve_runs_are_measured_with_one_load_and_one_calibration(tmp_path, monkeypatch):
    tiny = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setattr(benchmark_sweep, "SHAPE", tiny)
    monkeypatch.setattr(benchmark_sweep, "SEQ_LEN", 32)
    benchmark_sweep.write_model(tmp_path / "model")
    rows = {
        name: benchmark_sweep.measure_sweep(tmp_path / "model", tmp_path / name, 2, ratios, allocators)
        for name, ratios, allocators in (
            ("one", benchmark_sweep.RATIOS[-1:], benchmark_sweep.ALLOCATORS[:1]),
            ("twelve", benchmark_sweep.RATIOS, benchmark_sweep.ALLOCATORS),
        )
    }
    assert [(row["runs"], row["loads"], row["calibrations"]) for row in rows.values()] == [(1, 1, 1), (12, 1, 1)]
    assert all(0 < row["check"] < row["seconds"] for row in rows.values())
    part = {"windows": 2, "one": [rows["one"]], "twelve": [rows["twelve"]], "ratio": 1.25, "ratios": [1.25]}
    text = benchmark_sweep.render_table({"repeats": 1, "parts": [part], "environment": environment.describe()})
    assert "| **1.25** (1.25 to 1.25) | 1 | 1 |" in text


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("repeat=3", "benchmark sweep: repeat=3: there is no such key; there are repeats, work and results"),
        ("repeats=few", "benchmark sweep: repeats=few: give a whole number from 1"),
    ],
)
def test_bad_input_is_one_line(capsys, word, line):
    assert benchmark_sweep.main([word]) == 2
    assert capsys.readouterr().err.splitlines() == [line]
