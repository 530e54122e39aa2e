"""A sweep: one calibration, nothing twice, nothing lost, whatever is killed or runs beside it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from cfsp.cli import sweep as command
from cfsp.launcher.launch import Queue
from cfsp.record.run_record import SCHEMA, RunRecord
from cfsp.sweep.job import Outcome, mark_failed, prepare_jobs
from tests.conftest import ROOT

SMALL = (
    "experiment=calibration_set", "calibration=bundled", "calibration.n_samples=4", "calibration.seq_len=32",
    "evaluation=none", "~evaluation.cost", "logger=none", "seed=0", "pruner=one_shot",
)  # fmt: skip
GRID = ("allocator=coarse,uniform,global_rank", "sparsity.ratio=0.2,0.3,0.4,0.5")


def _places(tmp_path, name: str = "") -> list[str]:
    return [f"paths.{key}={tmp_path / (name + key)}" for key in ("output_dir", "records_dir", "cache_dir")]


def _records(folder) -> dict[str, RunRecord]:
    found = {path.stem: RunRecord.read(path) for path in folder.glob("*.json")}
    return {name: record for name, record in found.items() if record is not None}


def _start(words, **environment) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cfsp.run", "sweep", *words], cwd=ROOT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'plugins'}", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_twelve_runs_calibrate_once_load_once_and_are_what_single_runs_are(tmp_path, run_cfsp, capsys):
    words = [*SMALL, *GRID, *_places(tmp_path)]
    assert command.main(words) == 0
    assert "12 runs, 0 done already" in capsys.readouterr().out
    records = _records(tmp_path / "records_dir")
    assert len(records) == 12
    cached = {
        name: [record.stages[at]["cached"] for record in records.values()]
        for at, name in enumerate(("load", "calibrate"))
    }
    assert sorted(cached["load"]) == sorted(cached["calibrate"]) == [False] + [True] * 11
    for words_of_one in (("allocator=uniform", "sparsity.ratio=0.3"), ("allocator=global_rank", "sparsity.ratio=0.5")):
        single = [word for word in SMALL[1:] if not word.startswith("~")]
        code, _, err = run_cfsp(
            *single, *words_of_one, "save.model=false", f"paths.output_dir={tmp_path / words_of_one[0][10:]}"
        )
        assert code == 0, err
        alone = RunRecord.read(tmp_path / words_of_one[0][10:] / "record.json")
        assert alone is not None
        swept = records[alone.run_id]
        assert (swept.identity, swept.plan, swept.blocks) == (alone.identity, alone.plan, alone.blocks)
        plans = [
            folder / "plan.json" for folder in (tmp_path / words_of_one[0][10:], tmp_path / "output_dir" / alone.run_id)
        ]
        assert plans[0].read_bytes() == plans[1].read_bytes()
    assert command.main(words) == 0
    assert "12 runs, 12 done already" in capsys.readouterr().out
    one = [*words, "allocator=uniform", "sparsity.ratio=0.2", "save.model=true"]
    assert command.main(one) == 0  # a record is no model
    assert "1 runs, 0 done already" in capsys.readouterr().out
    assert len(list((tmp_path / "output_dir").glob("*/model/config.json"))) == 1
    finished = {name: record.finished for name, record in records.items()}
    time.sleep(1.1)
    assert command.main([*words, "force=true", "sparsity.ratio=0.2"]) == 0
    again = {name for name, record in _records(tmp_path / "records_dir").items() if record.finished != finished[name]}
    assert len(again) == 3


def test_a_run_after_another_starts_from_the_same_weights(tmp_path):
    """Evaluated dense, sliced with biases, evaluated dense again: the figures of a fresh process."""
    evaluated = [word for word in SMALL if not word.startswith(("evaluation", "~", "pruner"))]
    evaluated += ["evaluation=perplexity", "~evaluation.cost", "evaluation.perplexity.datasets=[bundled]"]
    evaluated += ["evaluation.perplexity.seq_len=64", "evaluation.perplexity.windows=[0,4]", "sparsity.ratio=0.5"]
    assert command.main([*evaluated, "pruner=flap,flap_al_am,shortgpt,cfsp", *_places(tmp_path, "swept")]) == 0
    assert command.main([*evaluated, "pruner=cfsp", *_places(tmp_path, "alone")]) == 0
    (alone,) = _records(tmp_path / "alonerecords_dir").values()
    swept = _records(tmp_path / "sweptrecords_dir")[alone.run_id]
    assert [stage["cached"] for stage in swept.stages if stage["name"] == "load"] == [True]
    assert swept.measurements == alone.measurements


def test_a_run_that_fails_or_dies_costs_no_other(tmp_path, capsys):
    words = [
        *SMALL,
        "importance=magnitude",
        "plugins.allow=[failing_importance]",
        "sparsity.ratio=0.5",
        *_places(tmp_path),
    ]
    targets = ("cfsp.importance.magnitude.Magnitude", "failing_importance.Raises", "failing_importance.Dies")
    words.append(f"importance._target_={','.join(targets)}")
    process = _start([*words, "launcher=local", "launcher.processes=2"])
    out, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert out.count("FAILED") == 2
    assert "ValueError: this metric does not work" in out
    assert "its process was ended by SIGKILL" in out
    assert "2 of 3 runs failed; the same command tries them again" in err
    assert len(_records(tmp_path / "records_dir")) == 1
    status = _start([*words, "status=true"])
    out, _ = status.communicate(timeout=100)
    assert status.returncode == 0
    assert "3 runs: 1 done, 0 running, 2 failed, 0 interrupted, 0 missing" in out
    assert re.search(r"failed +.*Raises .*ValueError: this metric does not work", out)
    assert re.search(r"failed +.*Dies .*ended by SIGKILL", out)


def _whole(tmp_path, count: int) -> None:
    """Every run there once; nothing half written, nobody waiting."""
    records = _records(tmp_path / "records_dir")
    assert len(records) == count
    assert all(record.status == "success" for record in records.values())
    assert {path.name for path in (tmp_path / "output_dir").iterdir()} == set(records)
    statistics = [path for path in (tmp_path / "cache_dir" / "statistics").iterdir() if path.suffix == ".safetensors"]
    assert len(statistics) == 1
    for name in records:
        assert json.loads((tmp_path / "output_dir" / name / "record.json").read_text())["status"] == "success"
        assert not list((tmp_path / "output_dir" / name).glob(".lease*"))


def test_two_sweeps_at_the_same_time_do_nothing_twice(tmp_path):
    words = [*SMALL, *GRID, *_places(tmp_path)]
    both = [_start(words), _start([*words, "launcher=local"])]
    outs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    _whole(tmp_path, 12)
    for folder in (tmp_path / "output_dir").iterdir():
        assert (folder / "run.log").read_text().count("cfsp.record.stages: load ...") == 1
    logs = [(folder / "run.log").read_text() for folder in (tmp_path / "output_dir").iterdir()]
    assert (
        sum("calibrate: " in log and "(cached)" not in log.split("calibrate: ")[1].splitlines()[0] for log in logs) == 1
    )


def _unfinished_work(cache, done) -> dict[str, float]:
    """What the runs that are not done have left: when a plan or a figure was written, how far a training was sealed."""
    found: dict[str, float] = {}
    for folder in (cache / "progress").glob("*"):
        if not folder.is_dir() or folder.name in done:
            continue
        with contextlib.suppress(FileNotFoundError):
            for path in [*folder.glob("plan.json"), *folder.glob("measured/*.json")]:
                found[f"{folder.name} {path.name}"] = path.stat().st_mtime_ns
        for path in folder.glob("training/*/cfsp_complete.json"):
            step = float(path.parent.name.removeprefix("checkpoint-").replace("trained", "inf"))
            key = f"{folder.name} training"
            found[key] = max(step, found.get(key, 0))
    return found


def _killed_and_relaunched(tmp_path, kills: int, seed: int, small=SMALL, grid=GRID, within=2.0) -> set[str]:
    """Nothing that was finished is lost or done again: a run, statistics, a plan, a figure, a training's checkpoint."""
    words = [*small, *grid, *_places(tmp_path), "launcher=local", "launcher.processes=2"]
    rng, done = random.Random(seed), {}
    statistics: dict[str, int] = {}
    unfinished: dict[str, float] = {}
    seen: set[str] = set()
    for _ in range(kills):
        process = _start(words)
        while process.poll() is None and not list((tmp_path / "output_dir").glob("*/.lease")):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, within))  # a run without training and evaluation takes about half a second
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        now = {name: record.finished for name, record in _records(tmp_path / "records_dir").items()}
        assert done.items() <= now.items()  # what was finished is neither lost nor repeated
        done = now
        files = (tmp_path / "cache_dir" / "statistics").glob("*.safetensors")
        found = {path.name: path.stat().st_mtime_ns for path in files}
        assert statistics.items() <= found.items()
        statistics = found
        work = _unfinished_work(tmp_path / "cache_dir", done)
        for name, value in unfinished.items():
            if name.split()[0] not in done:
                assert work[name] >= value if name.endswith("training") else work[name] == value, name
        unfinished = work
        seen |= {name.split()[1] for name in work}
    process = _start(words)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert re.search(rf" runs, {len(done)} done already", out)
    if "training" in seen:
        logs = [(folder / "run.log").read_text() for folder in (tmp_path / "output_dir").iterdir()]
        assert any("going on from checkpoint-" in log for log in logs)
    return seen


def test_killed_at_random_moments_the_same_command_goes_on(tmp_path):
    _killed_and_relaunched(tmp_path, kills=2, seed=0)
    _whole(tmp_path, 12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_many_times(tmp_path, seed):
    _killed_and_relaunched(tmp_path, kills=12, seed=seed)
    _whole(tmp_path, 12)


@pytest.mark.slow
def test_killed_many_times_while_it_trains_and_evaluates(tmp_path):
    texts = [
        f"evaluation.perplexity.texts.{name}.path=pkg://cfsp/assets/text/evaluation.txt" for name in ("text", "ptb")
    ]
    small = [
        *(word for word in SMALL if not word.startswith(("evaluation", "~", "seed"))), *texts,
        "evaluation=perplexity", "evaluation.perplexity.datasets=[bundled,text,ptb]", "~evaluation.cost",
        "evaluation.perplexity.seq_len=64", "evaluation.perplexity.windows=[0,40]",
        "recovery=lora", "recovery/data=text", "recovery.data.path=pkg://cfsp/assets/text/calibration.txt",
        "recovery.max_steps=12", "recovery.batch_size=4", "recovery.micro_batch_size=2", "recovery.cutoff=32",
        "recovery.checkpoint_every=2",
    ]  # fmt: skip
    seen = _killed_and_relaunched(tmp_path, kills=14, seed=3, small=small, grid=("seed=0,1,2,3",), within=12)
    assert {"plan.json", "training"} <= seen, "it was killed too early for this to mean something"
    assert len(seen) > 2, "not one figure had been measured when it was killed"


def test_what_a_killed_run_had_planned_and_measured_is_not_done_again(tmp_path, run_cfsp, monkeypatch):
    """Stopped in the second text of the evaluation; then the plan and the first text are read, not made."""
    from cfsp.evaluation.perplexity import Perplexity
    from cfsp.pruner.one_shot import OneShotPruner

    texts = [
        f"evaluation.perplexity.texts.{name}.path=pkg://cfsp/assets/text/evaluation.txt" for name in ("text", "ptb")
    ]
    words = [
        "calibration.n_samples=4", "calibration.seq_len=32", "evaluation=perplexity", "save.model=false", *texts,
        "evaluation.perplexity.datasets=[bundled,text,ptb]", "evaluation.perplexity.seq_len=64",
        "evaluation.perplexity.windows=[0,4]",
    ]  # fmt: skip
    measured, planned = [], []
    measure, plan = Perplexity._measure, OneShotPruner.plan

    def counting(self, name, model, tokenizer):
        if name == "text" and measured.count("text") == 1 and "stop" not in measured:
            measured.append("stop")
            raise KeyboardInterrupt  # after the dense side, in the pruned one
        measured.append(name)
        return measure(self, name, model, tokenizer)

    monkeypatch.setattr(Perplexity, "_measure", counting)
    monkeypatch.setattr(OneShotPruner, "plan", lambda self, context: planned.append(1) or plan(self, context))
    code, _, _ = run_cfsp(*words)
    assert code == 1
    assert measured == ["bundled", "text", "ptb", "bundled", "stop"]
    code, _, err = run_cfsp(*words)
    assert code == 0, err
    assert measured[5:] == ["text", "ptb"]
    assert len(planned) == 1
    record = RunRecord.read(tmp_path / "out" / "record.json")
    assert record is not None
    assert [row["task"] for row in record.measurements["pruned"]] == ["bundled", "text", "ptb"]
    assert not list((tmp_path / "cache" / "progress").iterdir())
    code, _, err = run_cfsp(*words, "force=true")
    assert code == 0, err
    assert measured[7:] == ["bundled", "text", "ptb"] * 2
    assert len(planned) == 2


def test_a_damaged_record_is_written_again_and_another_schema_with_force(tmp_path, capsys):
    words = [*SMALL, "sparsity.ratio=0.5", *_places(tmp_path)]
    assert command.main(words) == 0
    (copy,) = (tmp_path / "records_dir").glob("*.json")
    whole = copy.read_bytes()
    other = whole.replace(f'"schema": {SCHEMA}'.encode(), b'"schema": 99')
    assert other != whole
    for damage in (whole[:100], other, b"{}"):
        copy.write_bytes(damage)
        assert command.main(words) == 0
        assert copy.read_bytes() == whole
    (own,) = (tmp_path / "output_dir").glob("*/record.json")
    for path in (own, copy):
        path.write_bytes(other)
    assert command.main(words) == 1
    assert "not a run record (schema 99" in capsys.readouterr().out
    assert command.main([*words, "force=true"]) == 0
    assert _records(tmp_path / "records_dir")[copy.stem].status == "success"


def test_reasons_are_shown_as_they_are(tmp_path, capsys):
    words = [*SMALL, "sparsity.ratio=0.5", *_places(tmp_path)]
    job = prepare_jobs(command.read_request(words).cells)[0]
    mark_failed(job, "size [3, 4] of [layer] at [/data/x]")
    assert command.main([*words, "status=true"]) == 0
    assert "ProcessDied: size [3, 4] of [layer] at [/data/x]" in capsys.readouterr().out
    record = RunRecord(job.run_id, error={"type": "KeyboardInterrupt", "message": ""})
    record.write(job.out / "record.json")
    assert command.main([*words, "status=true"]) == 0
    assert re.search("interrupted .*it was stopped; the next launch goes on", capsys.readouterr().out)


def test_a_run_that_failed_in_another_sweep_is_not_repeated(tmp_path):
    (job,) = prepare_jobs(command.read_request([*SMALL, "sparsity.ratio=0.5", *_places(tmp_path)]).cells)
    mark_failed(job, "before this sweep began")
    time.sleep(0.1)
    queue = Queue([job])
    assert queue.take_next() is job
    assert queue.outcome_elsewhere(job) is None
    assert not queue.settle(job, Outcome("busy"))
    assert queue.outcome_elsewhere(job) is None, "it failed before: it is to be tried"
    mark_failed(job, "after")
    assert queue.outcome_elsewhere(job) == Outcome("failed", "ProcessDied: after")


def test_a_key_of_the_experiment_is_named_as_such(tmp_path, capsys):
    assert command.main(["experiment=block_metric", "evaluation=none", *_places(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert "(experiment=block_metric says evaluation.cost; ~evaluation.cost on the command line leaves it out)" in line
