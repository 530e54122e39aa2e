"""Sweeps through a real Slurm, which the test sets up on this machine and takes down again (slurm.sh)."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cfsp.record.run_record import RunRecord
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

SMALL = (
    "experiment=calibration_set", "calibration=bundled", "calibration.n_samples=4", "calibration.seq_len=32",
    "evaluation=none", "~evaluation.cost", "logger=none", "seed=0", "pruner=one_shot", "importance=magnitude",
    "plugins.allow=[failing_importance]", "launcher=slurm", "launcher.timeout_min=10",
)  # fmt: skip
MAGNITUDE = "importance._target_=cfsp.importance.magnitude.Magnitude"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Slurm's commands talk to a Slurm of this machine inside."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    if os.geteuid() != 0 or not (shutil.which("sbatch") or shutil.which("apt-get")):
        pytest.skip("needs root, and slurm-wlm or a Debian to install it on")
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([ROOT / "tests" / "slurm" / "slurm.sh", "start", folder], check=True, timeout=300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield
    subprocess.run([ROOT / "tests" / "slurm" / "slurm.sh", "stop", folder], check=True, timeout=60)


@pytest.fixture
def start(slurm, tmp_path):
    """Start a sweep: ``process = start("key=value", ...)``; its gate (failing_importance.Waits) is tmp_path/gate."""
    started = []

    def call(*words: str) -> subprocess.Popen[str]:
        places = [f"paths.{key}={tmp_path / key}" for key in ("output_dir", "records_dir", "cache_dir")]
        places.append(f"launcher.submitit_folder={tmp_path / 'submitit'}")
        environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'plugins'}", "GATE": str(tmp_path / "gate")}
        process = subprocess.Popen(
            [sys.executable, "-m", "cfsp.run", "sweep", *SMALL, *places, *words], cwd=ROOT, text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield call
    subprocess.run(["scancel", "--user=root"], check=True)
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def _queue(*states: str) -> list[str]:
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--states={','.join(states)}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def _until(condition, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.2)


def _ended(process: subprocess.Popen[str], code: int) -> str:
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, out + err
    return out + err


def _log_of(folder: Path) -> str:
    return (folder / "run.log").read_text()


def _finished(tmp_path) -> dict[str, RunRecord]:
    """The records; each run was done once, and one of them calibrated."""
    records = {path.stem: RunRecord.read(path) for path in (tmp_path / "records_dir").glob("*.json")}
    logs = [_log_of(tmp_path / "output_dir" / name) for name in records]
    assert all(log.count("cfsp.record.stages: load ...") == 1 for log in logs)
    assert sum("(cached)" not in log.split("calibrate: ")[1].splitlines()[0] for log in logs) == 1
    return records


def test_one_array_one_calibration_and_a_failed_run(start, tmp_path):
    arms = f"{MAGNITUDE},failing_importance.Same,failing_importance.Raises,failing_importance.Twin"
    out = _ended(start("sparsity.ratio=0.3", arms), 1)
    assert "4 runs submitted to Slurm" in out
    assert "1 of 4 runs failed; the same command tries them again" in out
    assert len(_finished(tmp_path)) == 3
    out = _ended(start("sparsity.ratio=0.3", arms), 1)
    assert "4 runs, 3 done already" in out
    assert "1 runs submitted to Slurm" in out
    out = _ended(start("sparsity.ratio=0.3", arms, "status=true"), 0)
    assert re.search(r"failed +.*Raises .*ValueError: this metric does not work", out)


def test_scancel_and_the_end_of_time_cost_one_run(start, tmp_path):
    words = ["sparsity.ratio=0.3", f"{MAGNITUDE},failing_importance.Waits"]
    process = start(*words)
    _until(lambda: sum("plan ..." in path.read_text() for path in (tmp_path / "output_dir").glob("*/run.log")) == 2)
    _until(lambda: len(_queue("RUNNING")) == 1)
    subprocess.run(["scancel", *_queue("RUNNING")], check=True)
    out = _ended(process, 1)
    assert "1 of 2 runs failed" in out
    assert "ended without a result: CANCELLED (by scancel or an administrator)" in out
    assert "CANCELLED" in _ended(start(*words, "status=true"), 0)
    out = _ended(start(*words, "launcher.timeout_min=1", "launcher.signal_delay_s=20"), 1)
    assert "2 runs, 1 done already" in out
    assert "its time was up (raise launcher.timeout_min)" in out
    assert "its time was up" in _ended(start(*words, "status=true"), 0)
    (tmp_path / "gate").touch()
    assert "2 runs, 1 done already" in _ended(start(*words), 0)


def test_a_killed_sweep_command_is_taken_up_again(start, tmp_path):
    words = ["sparsity.ratio=0.2,0.3,0.4,0.5", "importance._target_=failing_importance.Waits"]
    process = start(*words)
    _until(lambda: len(_queue("RUNNING")) == 1 and len(_queue("PENDING")) == 3)
    os.killpg(process.pid, signal.SIGKILL)
    assert len(_queue("RUNNING", "PENDING")) == 4
    again = start(*words)
    for line in again.stdout:
        if "4 runs were submitted before" in line:
            break
    (tmp_path / "gate").touch()
    out = _ended(again, 0)
    assert "submitted to Slurm" not in out
    assert len(_finished(tmp_path)) == 4


def test_an_interrupted_sweep_command_says_what_stays(start, tmp_path):
    words = ["sparsity.ratio=0.2,0.3", "importance._target_=failing_importance.Waits"]
    process = start(*words)
    _until(lambda: len(_queue("RUNNING")) == 1)
    process.send_signal(signal.SIGINT)
    out = _ended(process, 1)
    assert re.search(r"the runs stay with Slurm; to end them: scancel \d+", out)
    assert "interrupted; the same command goes on" in out


def test_what_sbatch_refuses_is_one_line(start):
    out = _ended(start("sparsity.ratio=0.2", MAGNITUDE, "launcher.partition=nowhere"), 2)
    (line,) = [line for line in out.splitlines() if line.startswith("sweep: ")]
    assert "launcher=slurm: the runs were not submitted" in line
    assert "nowhere" in line or "partition" in line
