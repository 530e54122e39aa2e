"""A sweep through submitit, in processes of this machine; tests/slurm does it with a real Slurm."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cfsp.cli.sweep import main
from cfsp.launcher.cluster import SubmititLocal
from cfsp.launcher.slurm import Slurm
from cfsp.record.run_record import RunRecord
from cfsp.sweep.experiment import override_values
from cfsp.sweep.request import _launcher
from cfsp.system.package import config_folder
from tests.conftest import ROOT

pytest.importorskip("hydra_plugins.hydra_submitit_launcher.config")

SMALL = (
    "experiment=calibration_set", "calibration=bundled", "calibration.n_samples=4", "calibration.seq_len=32",
    "evaluation=none", "~evaluation.cost", "logger=none", "seed=0", "pruner=one_shot", "importance=magnitude",
    "plugins.allow=[failing_importance]",
)  # fmt: skip


@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys):
    """``code, out, err = sweep("key=value", ...)``, from a folder of its own, with paths relative to it."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests' / 'plugins'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "plugins"))
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        code = main([*SMALL, "paths.cache_dir=cache", "paths.records_dir=records", *words])
        return code, *capsys.readouterr()

    return call


def test_one_fails_the_others_calibrate_once_and_a_relaunch_does_what_is_left(sweep):
    arms = [
        "cfsp.importance.magnitude.Magnitude",
        *(f"failing_importance.{name}" for name in ("Raises", "Same", "Twin")),
    ]
    words = ["launcher=submitit_local", "sparsity.ratio=0.3", f"importance._target_={','.join(arms)}"]
    code, out, err = sweep(*words)
    assert code == 1
    assert "4 runs, 0 done already" in out
    assert re.search(r"\[\d/4\] \S*Raises: FAILED: ValueError: this metric does not work", out)
    assert "1 of 4 runs failed; the same command tries them again" in err
    records = [RunRecord.read(path) for path in Path("records").glob("*.json")]
    assert [record.status for record in records] == ["success"] * 3
    assert sorted(record.stages[1]["cached"] for record in records) == [False, True, True]
    assert len(list(Path("outputs/sweeps/calibration_set/bundled").iterdir())) == 4
    code, out, _ = sweep(*words, "status=true")
    assert code == 0
    assert "4 runs: 3 done, 0 running, 1 failed" in out
    code, out, _ = sweep(*words)
    assert code == 1
    assert "4 runs, 3 done already" in out
    assert out.count("FAILED") == 1
    assert {path.name for path in Path().iterdir()} == {"cache", "records", "outputs"}


def test_a_job_that_is_killed_has_failed_and_its_record_says_so(sweep):
    words = ["launcher=submitit_local", "sparsity.ratio=0.3", "importance._target_=failing_importance.Dies"]
    code, out, _ = sweep(*words)
    assert code == 1
    assert re.search(r"FAILED: process \d+ ended without a result; see outputs/submitit/\S+_log.err", out)
    _, out, _ = sweep(*words, "status=true")
    assert re.search(r"failed .*ended without a result", out)


def _refused(sweep, *words: str) -> str:
    code, _, err = sweep(*words)
    assert code == 2
    (line,) = err.splitlines()
    assert not Path("outputs").exists()
    return line


def test_wrong_command_lines_are_refused_in_one_line(sweep, monkeypatch):
    line = _refused(sweep, "launcher=slurm", "launcher.partitoin=x")
    assert "launcher.partitoin=x: unknown key; did you mean partition?" in line
    assert "launcher.timeout_min=soon" in _refused(sweep, "launcher=slurm", "launcher.timeout_min=soon")
    line = _refused(sweep, "launcher=slurm", "launcher.nodes=2")
    assert "launcher.nodes=2: a run is one process on one machine; use 1" in line
    line = _refused(sweep, "launcher=slurm", "launcher.gpus=1", "launcher.gpus_per_node=1")
    assert "launcher.gpus and launcher.gpus_per_node are the same" in line
    line = _refused(sweep, "launcher=submitit_local", "launcher.partition=x")
    assert "launcher.partition=x: unknown key" in line
    assert "launcher.setup: a launcher's key has one value" in _refused(sweep, "launcher=slurm", "launcher.setup=a,b")
    monkeypatch.setenv("PATH", "")
    assert "launcher=slurm: there is no sbatch on this machine" in _refused(sweep, "launcher=slurm")
    monkeypatch.setitem(sys.modules, "submitit", None)
    for option in ("slurm", "submitit_local"):
        line = _refused(sweep, f"launcher={option}")
        assert f"launcher={option} needs hydra-submitit-launcher" in line
        assert 'pip install "cfsp[slurm]"' in line


def test_the_keys_are_the_plugins_and_the_files():
    from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf

    def keys(schema: type) -> set[str]:
        return {field.name for field in dataclasses.fields(schema)} - {"_target_"}

    assert keys(Slurm) - {"gpus"} == keys(SlurmQueueConf)
    # The others of the local ones are read by nothing there.
    of_local = keys(LocalQueueConf) - {"cpus_per_task", "mem_gb", "name", "nodes", "tasks_per_node"}
    assert keys(SubmititLocal) - {"gpus", "array_parallelism"} == of_local
    for option, schema in (("slurm", Slurm), ("submitit_local", SubmititLocal)):
        values = OmegaConf.to_container(OmegaConf.load(config_folder() / "launcher" / f"{option}.yaml"))
        assert set(values) - {"_target_"} == keys(schema)
        assert {key: values[key] for key in keys(schema)} == dataclasses.asdict(schema())


def _sbatch(folder, *words: str) -> str:
    launcher = _launcher({"launcher": "slurm", **override_values(words)})
    return launcher._executor(folder, 5)._executor._make_submission_file_text("true", "x")


def test_what_sbatch_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr("submitit.SlurmExecutor.affinity", lambda _: 2)
    text = _sbatch(
        tmp_path, "launcher.partition=short", "launcher.timeout_min=90", "launcher.gpus=2", "launcher.cpus_per_task=4",
        "launcher.mem_gb=32", "launcher.setup=[module load cuda,ulimit -c 0]", "launcher.qos=high",
        "launcher.additional_parameters={mail-type: END}", "launcher.max_num_timeout=3",
    )  # fmt: skip
    for said in ("partition=short", "time=90", "gpus-per-node=2", "cpus-per-task=4", "mem=32GB", "qos=high"):
        assert f"#SBATCH --{said}\n" in text
    assert "#SBATCH --mail-type=END\n" in text
    assert "export SRUN_CPUS_PER_TASK=4\nmodule load cuda\nulimit -c 0\n" in text
    usual = _sbatch(tmp_path)
    assert not re.search(r"--(mem|gpus|cpus|partition|qos)", usual)


def test_hydras_own_launcher_does_not_hide_a_failed_run(tmp_path):
    words = [
        "hydra/launcher=submitit_local", "importance=magnitude", "plugins.allow=[failing_importance]",
        "importance._target_=failing_importance.Raises", "calibration.n_samples=4", "calibration.seq_len=32",
        "evaluation=none", "logger=none", "save.model=false",
    ]  # fmt: skip
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'plugins'}", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "cfsp.run", "-m", *words], cwd=tmp_path, env={**os.environ, **environment}, text=True,
        capture_output=True, timeout=100,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "cfsp: the run failed (ValueError: this metric does not work)" in ended.stderr
