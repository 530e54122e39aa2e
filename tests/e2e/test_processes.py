"""Several processes: DDP and FSDP train what one process trains, and files are written once. Two processes on gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT

DDP = ("--multi_gpu",)  # accelerate's word for several processes; without a GPU they train on the CPU
FSDP = ("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP")


@pytest.fixture
def words(sound_words, prose_file, tmp_path):
    """14 steps are less than one epoch: at its end, two processes fill up their batches and one does not."""
    return [
        *sound_words, "save.model=true", "save.dtype=float32", "logger=none",
        "evaluation=perplexity", "evaluation.perplexity.datasets=[text]", "evaluation.perplexity.seq_len=32",
        f"evaluation.perplexity.texts.text.path={prose_file}",
        f"recovery.data.path={prose_file}", "recovery.cutoff=32", "recovery.max_steps=14", "recovery.log_every=1",
        "recovery.batch_size=4", "recovery.micro_batch_size=2", "recovery.checkpoint_every=2",
        f"paths.cache_dir={tmp_path / 'cache'}", f"paths.records_dir={tmp_path / 'records'}",
    ]  # fmt: skip


def launch(flags, *words) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *flags, "--num_processes", "2", "--num_machines", "1",
         "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "cfsp.run", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finished(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (DDP, ["recovery=ig_lora", "recovery.dropout=0"]),
        (FSDP, ["recovery=full", "recovery.objective=distill", "recovery.distill_weight=0.5"]),
    ],
    ids=["ddp", "fsdp"],
)
def test_two_processes_train_what_one_does(run_cfsp, words, tmp_path, flags, settings):
    code, _, err = run_cfsp(*words, *settings, f"paths.output_dir={tmp_path / 'one'}")
    assert code == 0, err
    code, out, err = finished(launch(flags, *words, *settings, f"paths.output_dir={tmp_path / 'two'}", "force=true"))
    assert code == 0, err
    assert out.count("Written to") == 1
    assert err.count("evaluate recovered ...") == 1
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)
    records = [json.loads((tmp_path / name / "record.json").read_text()) for name in ("one", "two")]
    assert records[0]["run_id"] == records[1]["run_id"]
    assert [r["recovery"]["processes"] for r in records] == [1, 2]
    assert records[1]["recovery"]["parallel"] == ("fsdp" if flags is FSDP else "ddp")
    assert records[0]["recovery"]["tokens"] == records[1]["recovery"]["tokens"] == 14 * 4 * 32
    losses = [[row["loss"] for row in r["recovery"]["history"]] for r in records]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert len(list((tmp_path / "records").iterdir())) == 1


def test_killed_processes_go_on_together(words, tmp_path):
    given = [*words, "recovery=ig_lora"]
    code, _, err = finished(launch(DDP, *given, f"paths.output_dir={tmp_path / 'whole'}"))
    assert code == 0, err
    out = tmp_path / "killed"
    process = launch(DDP, *given, f"paths.output_dir={out}")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if list(tmp_path.glob("cache/progress/*/training/checkpoint-*/cfsp_complete.json")):
            break
        time.sleep(0.005)
    launcher = psutil.Process(process.pid)
    for one in [launcher, *launcher.children(recursive=True)]:
        one.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "model").exists()
    code, _, err = finished(launch(DDP, *given, f"paths.output_dir={out}"))
    assert code == 0, err
    assert "going on from checkpoint-" in (out / "run.log").read_text()
    whole, again = weights(tmp_path / "whole"), weights(out)
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-5)


def test_what_is_wrong_is_said_once_and_nobody_waits(words, tmp_path):
    given = [*words, "recovery=lora", "recovery.batch_size=2", f"paths.output_dir={tmp_path / 'out'}"]
    code, _, err = finished(launch(DDP, *given))
    assert code != 0
    (line,) = [line for line in err.splitlines() if line.startswith("cfsp: ")]
    assert "recovery.batch_size=2" in line
    assert "2 processes" in line


def test_processes_without_a_training_end_together(words, tmp_path):
    given = [word for word in words if not word.startswith("recovery.")]
    code, out, err = finished(launch(DDP, *given, f"paths.output_dir={tmp_path / 'out'}"))
    assert code == 0, err
    assert out.count("Written to") == 1
