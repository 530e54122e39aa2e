"""The benchmark on tiny models: every part measures what it says, its table shows it, and a missed limit is named."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import pytest
import torch

from cfsp.benchmark import calibration, growth, peer_job, peers, processes, shapes, speed, streaming
from cfsp.benchmark.make_checkpoint import Shape
from cfsp.benchmark.part import Check, Result, Settings, write_result
from cfsp.cli import benchmark
from cfsp.errors import RunError

TINY = Shape(hidden=32, ffn=256, blocks=2, heads=4, kv_heads=4, vocab=4096, positions=128, dtype="float32")


@pytest.fixture
def settings(tmp_path, monkeypatch, one_thread):
    """Of a command line that measures tiny models on the CPU."""
    monkeypatch.setitem(shapes.SHAPES, "small", TINY)
    for module in (shapes, calibration, growth, streaming, peers):
        if hasattr(module, "SEQ_LEN"):
            monkeypatch.setattr(module, "SEQ_LEN", 16)
    return Settings(
        repeats=2, work=tmp_path / "work", results=tmp_path / "results", device="cpu", shapes=("small",), windows=(4,)
    )


def test_calibration_is_measured_beside_a_bare_forward_pass(settings):
    found = calibration.measure(settings)
    assert [row["dtype"] for row in found.rows] == ["float32", "bfloat16"]
    for row in found.rows:
        assert row["tokens"] == 4 * 16
        assert set(row["tried_batch_sizes"]) <= {1, 2, 4}
        assert row["batch_size"] == min(row["tried_batch_sizes"], key=row["tried_batch_sizes"].get)
        assert len(row["ratios"]) == 2
        expected = [a / b for a, b in zip(row["seconds"]["ours"], row["seconds"]["bare"], strict=True)]
        assert row["ratios"] == expected
        assert set(row["stage_seconds"]) == set(row["stage_peak_bytes"]) == set(calibration.STAGES)
        assert row["peak_beside_weights"].keys() == {"bare", *calibration.STAGES}
        assert row["peak_beside_weights"]["bare"] > 0
        assert row["lm_head_calls"] == 0
    limited = [check.name for check in found.checks if check.limit == calibration.LIMIT]
    assert len(limited) == 1
    assert limited[0].startswith("small float32 cpu 4 x 16")
    assert "| small bfloat16 cpu 4 x 16 |" in calibration.render_table(found)
    assert not (settings.work / "calibration-saved").exists()


def test_batch_sizes_are_tried_until_one_is_no_better(monkeypatch):
    model, ids = shapes.build_model(TINY, torch.float32, torch.device("cpu")), shapes.draw_token_ids(64, 16, TINY.vocab)
    sizes = []
    monkeypatch.setattr(calibration, "run_bare_forward", lambda model, ids, size: sizes.append((size, len(ids))))

    def tried(best):
        monkeypatch.setattr(
            calibration, "time_call", lambda call, _: call() or (1 + abs(sizes[-1][0] - best)) * sizes[-1][1]
        )
        return list(calibration.time_batch_sizes(model, ids))

    assert tried(16) == [1, 2, 4, 8, 16, 32], "beyond the best"
    assert tried(64) == [1, 2, 4, 8, 16, 32, 64], "all windows: there is no larger one"
    assert tried(1) == [1, 2]
    assert all(windows >= size for size, windows in sizes)

    def full(model, ids, size):
        if size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append((size, len(ids)))

    monkeypatch.setattr(calibration, "run_bare_forward", full)
    assert tried(64) == [1, 2, 4]


def test_more_windows_are_measured_without_what_only_takes_longer(settings):
    found = calibration.measure(replace(settings, windows=(4, 2), repeats=1))
    measured = {(row["dtype"], row["windows"]): row for row in found.rows}
    assert measured.keys() == {("float32", 4), ("float32", 2), ("bfloat16", 2)}
    assert max(measured["float32", 4]["tried_batch_sizes"]) <= 4
    assert {key for key, row in measured.items() if row["stage_seconds"]} == {("float32", 2), ("bfloat16", 2)}
    assert all(row["peak_beside_weights"]["calibrate"] > 0 for row in found.rows)
    assert "| small float32 cpu 4 x 16 |" in calibration.render_table(found)


def test_stages_leave_the_model_as_it_was(settings, tmp_path):
    model = shapes.build_model(TINY, torch.float32, torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    entries = calibration.time_stages(model, shapes.draw_token_ids(2, 16, TINY.vocab), 2, tmp_path / "saved")
    assert list(entries) == list(calibration.STAGES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_head_that_runs_is_counted(settings, tmp_path, monkeypatch):
    model = shapes.build_model(TINY, torch.float32, torch.device("cpu"))
    ids = shapes.draw_token_ids(2, 16, TINY.vocab)
    monkeypatch.setattr(calibration, "_stage_calls", lambda model, ids, *_: [("calibrate", lambda: model(ids))])
    assert calibration.measure_peak_bytes(model, ids, 2, tmp_path)[1] == 1


def test_speed_is_measured_against_what_sizes_promise(settings, monkeypatch):
    monkeypatch.setattr(speed, "PROMPT_TOKENS", 12)
    monkeypatch.setattr(speed, "NEW_TOKENS", 3)
    monkeypatch.setattr(speed, "PLAN_SEQ_LEN", 16)
    found = speed.measure(replace(settings, dtypes=("float32",)))
    variants = [(row["pruner"], row["ratio"], row["round_to"]) for row in found.rows]
    assert variants == [(v.pruner, v.ratio, v.round_to) for group in speed.GROUPS for v in group]
    uniform = found.rows[0]
    assert uniform["widths"] == [128, 128]
    linears = 2 * (4 * 32 * 32 + 3 * 32 * 256)
    attention = 2 * 32 * 12 * 13
    assert uniform["prefill"]["macs"]["dense"] == 12 * linears + 32 * 4096 + attention
    norms, keys_and_values = 5 * 32, 2 * 2 * 32 * 15
    assert uniform["decode"]["bytes_per_step"]["dense"] == 4 * (linears + norms + 32 * 4096 + 32 + keys_and_values)
    removed = 2 * 3 * 32 * 128
    assert uniform["prefill"]["macs"]["pruned"] == uniform["prefill"]["macs"]["dense"] - 12 * removed
    assert uniform["decode"]["of_predicted"] == uniform["decode"]["speedup"] / uniform["decode"]["predicted"]
    assert len(found.checks) == 2 * 3, "prefill and decode; uniform in 32s, cfsp in 32s and in 128s"
    assert all(check.at_least and "50%" in check.name for check in found.checks)
    assert "| small float32 cpu cfsp 20% in 32s |" in speed.render_table(found)


def test_growth_fits_an_exponent(settings, monkeypatch):
    assert growth.fit_exponent([1, 2, 4, 8], [3.0, 6.0, 12.0, 24.0]) == pytest.approx(1)
    assert growth.fit_exponent([1, 2, 4, 8], [3.0 * n**1.3 for n in (1, 2, 4, 8)]) == pytest.approx(1.3)
    for name, values in {"WINDOWS": (2, 4), "BLOCKS": (1, 2), "FFN": (64, 128), "HIDDEN": (32, 64)}.items():
        monkeypatch.setattr(growth, name, values)
    found = growth.measure(settings)
    assert [row["grows"] for row in found.rows] == ["windows", "blocks", "FFN width", "hidden and FFN width"]
    assert all(math.isfinite(row["exponent"]) and len(row["seconds"]) == 2 for row in found.rows)
    assert [check.name.split(",")[0] for check in found.checks] == ["windows", "blocks"]
    one, two = found.rows[1]["parameters_of_blocks"]
    assert two == 2 * one
    assert "| FFN width | 64, 128 |" in growth.render_table(found)


def test_a_checkpoint_is_pruned_in_a_process_that_is_watched(settings, monkeypatch):
    monkeypatch.setattr(streaming, "SHAPE", replace(TINY, dtype="bfloat16"))
    run = streaming.run_pruning
    monkeypatch.setattr(streaming, "run_pruning", lambda *given: {**run(*given[:3], None), "mode": given[3]})
    monkeypatch.setattr(streaming, "WINDOWS", 2)
    found = streaming.measure(replace(settings, blocks=2, modes=("off",), runs=1))
    (row,) = found.rows
    assert row["peak_bytes"] > 50e6
    assert row["stages"].keys() >= {"load", "calibrate", "plan", "apply", "save"}
    assert 0 < row["stages_seconds"] < row["seconds"]
    assert not (settings.work / "streaming" / "run").exists()
    assert row["same_plan"]
    assert found.name == "streaming_2_blocks", "beside the record of the usual size"
    found.rows.append({**row, "mode": "on", "peak_bytes": int(3e9), "same_plan": False})
    checks = {check.name: check.met for check in streaming._checks(found)}
    assert list(checks.values()) == [False, True, False]
    assert "| on |" in streaming.render_table(found)


def test_streaming_runs_start_from_the_disk_in_alternating_order(settings, monkeypatch):
    assert Settings().runs == 3
    monkeypatch.setattr(streaming, "SHAPE", replace(TINY, dtype="bfloat16"))
    monkeypatch.setattr(streaming, "WINDOWS", 2)
    events = []
    monkeypatch.setattr(streaming, "drop_from_page_cache", lambda files: events.append(len(files) > 1) or 0.0)

    def measured(folder, ids, run, mode):
        events.append(mode)
        stages = {"load": {"seconds": 1.0, "peak_bytes": 1}}
        return {"mode": mode, "seconds": 1.0, "peak_bytes": 1, "stages": stages, "plan": {}}

    monkeypatch.setattr(streaming, "run_pruning", measured)
    found = streaming.measure(replace(settings, blocks=2))
    assert events == [True, "off", True, "on", True, "on", True, "off", True, "off", True, "on"]
    assert "3 of each mode, in the order off, on, on, off, off, on; before each the checkpoint is dropped" in (
        text := streaming.render_table(found)
    )
    assert "0% of it was still in memory at most" in text
    found.rows[-1]["cached_before"] = None
    assert "could not be dropped" in streaming.render_table(found)


def test_a_file_is_dropped_from_the_page_cache(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(2**20))
    assert streaming.drop_from_page_cache([file]) in (0.0, None)
    assert file.read_bytes() == bytes(2**20)


def test_a_run_that_fails_is_one_line(settings, tmp_path):
    with pytest.raises(RunError, match="the run ended with exit code 2: cfsp: model.path="):
        streaming.run_pruning(tmp_path / "no such", tmp_path / "ids.npy", tmp_path / "run", None)


def test_memory_of_a_process_is_its_highest(tmp_path):
    code = "import time; x = bytearray(150_000_000); time.sleep(.2); del x; time.sleep(.2); print('done')"
    ended = processes.run_watched([sys.executable, "-c", code], tmp_path / "log")
    assert (ended.code, ended.out, ended.err) == (0, "done\n", "")
    assert 150e6 < ended.peak_bytes < 400e6
    assert ended.seconds > 0.4


def test_ours_is_measured_as_a_peer_is(settings, monkeypatch, tmp_path):
    """The peers themselves need their own environment; what they are given and give back is the same."""
    assert peer_job.JOB_FUNCTIONS.keys() == peer_job.JOBS.keys()
    monkeypatch.setattr(peer_job, "JOBS", {"cfsp": peer_job.JOBS["cfsp"]})
    monkeypatch.setattr(peers, "create_peer_environment", lambda _: None)
    found = peers.measure(replace(settings, repeats=1))
    (row,) = found.rows
    assert row["package"] == "cfsp"
    assert row["tokens"] == peers.WINDOWS * 16
    assert row["microseconds_per_token"] == pytest.approx(1e6 * row["seconds"][0] / row["tokens"])
    assert sum(row["widths"]) == 256
    assert all(check.met for check in found.checks)
    assert "| small cfsp |" in peers.render_table(found)
    weights_alone = peers.merge_repeats(
        [{**row, "tokens": 0, "seconds": 1.0, "beside_bytes": None, "peak_bytes": None}]
    )
    assert weights_alone["tokens_per_second"] is None
    assert "| none |  |  |  |" in peers.render_table(replace(found, rows=[weights_alone]))


def test_a_missed_limit_is_named_and_exits_with_1(settings, monkeypatch, capsys):
    class Part:
        @staticmethod
        def measure(_):
            return Result("growth", "parts=growth", checks=[Check("windows", 1.2, 0.05), Check("blocks", 0.01, 0.05)])

        @staticmethod
        def render_table(_):
            return "a table"

    monkeypatch.setitem(sys.modules, "cfsp.benchmark.growth", Part)
    words = ["parts=growth", "device=cpu", f"results={settings.results}"]
    assert benchmark.main(words) == 1
    printed = capsys.readouterr()
    assert "a table" in printed.out
    assert printed.err.splitlines() == ["benchmark: limit missed: growth: windows: 1.2, must be at most 0.05"]
    monkeypatch.setattr(Part, "measure", lambda _: Result("growth", "parts=growth"))
    assert benchmark.main(words) == 0


def test_the_record_says_what_holds_and_where_it_was_measured(settings):
    write_result(
        Result("speed", "parts=speed", [{"a": 1}], [Check("x", float("nan"), 1)], {"note": 2}), "text\n", settings
    )
    record = json.loads((settings.results / "benchmarks" / "speed.json").read_text())
    assert record["rows"] == [{"a": 1}]
    assert record["note"] == 2
    assert not record["checks"][0]["met"]
    assert record["environment"]["cores"] >= 1
    assert (settings.results / "tables" / "benchmark_speed.md").read_text() == "text\n"


def test_a_command_line_is_read():
    parts, settings = benchmark.read_request(["parts=speed,growth", "windows=8", "work=x", "runs=2", "modes=on"])
    assert parts == ("speed", "growth")
    assert (settings.windows, str(settings.work), settings.runs, settings.modes) == ((8,), "x", 2, ("on",))
    assert benchmark.read_request([]) == (benchmark.PARTS, Settings())


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["repeat=3"], ["repeat=3: there is no such key; did you mean repeats?; there are parts, repeats, "]),
        (["parts=sped"], ["parts=sped: there is no such choice; did you mean speed?; there are calibration, "]),
        (
            ["repeats=few", "windows=8,0"],
            ["repeats=few: give a whole number from 1", "windows=8,0: give whole numbers from 1"],
        ),
        (["device=abacus"], ["model.device=abacus: not usable here"]),
    ],
)
def test_bad_input_is_a_line_each(capsys, words, lines):
    assert benchmark.main(words) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(lines)
    for one, expected in zip(said, lines, strict=True):
        assert one.startswith(f"benchmark: {expected}")
