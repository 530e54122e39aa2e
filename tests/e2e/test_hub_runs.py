"""Whole runs against the local stand-in for the hub: online, then the same command offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, shared
from tests.helpers import hub as local

MODEL = "local/stories260K"
TASKS = ["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
SMALL = [
    "model=local", f"model.path={MODEL}", "calibration.n_samples=2", "calibration.seq_len=64", "sparsity.round_to=4",
    "logger=none", "evaluation.perplexity.seq_len=64", "evaluation.perplexity.windows=[0,2]",
]  # fmt: skip


@pytest.fixture
def server(tmp_path):
    local.in_shards(tmp_path / "served")
    roots = (tmp_path / "served", shared("hub", "stand_ins"), shared("hub"))
    with local.module("serve").LocalHub(*roots) as running:
        yield running


@pytest.fixture
def cfsp(server, tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a process of its own: ``cfsp(name, "key=value", ...)`` with OUT, CACHE of this name."""

    def call(name: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        folders = [f"paths.{key}={tmp_path / name / key}" for key in ("output_dir", "cache_dir", "records_dir")]
        variables = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        inherited = {key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "HF_HUB_CACHE")}
        return subprocess.run(
            [sys.executable, "-m", "cfsp.run", *SMALL, *folders, *words],
            env=inherited | {"PYTHONPATH": str(ROOT)} | variables | environment,
            cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip

    return call


def figures(tmp_path: Path, name: str) -> dict[tuple[str, str, str], float]:
    record = json.loads((tmp_path / name / "output_dir" / "record.json").read_text())
    return {
        (side, row["task"], row["metric"]): row["value"]
        for side, rows in record["measurements"].items()
        for row in rows
        if row["suite"] != "cost"
    }


def test_a_run_online_is_repeated_offline(cfsp, server, tmp_path):
    """Model in shards, calibration, text and a task of the hub that fails in passing; then none of it is asked for."""
    words = [
        "calibration=wikitext2", "evaluation=paper", "evaluation.cost=null", "evaluation.zero_shot.tasks=[openbookqa]",
        "evaluation.zero_shot.limit=4", "save.model=false",
    ]  # fmt: skip
    server.fault(status=503, times=2, match="/api/")
    online = cfsp("online", *words)
    assert online.returncode == 0, online.stderr
    assert "503" not in online.stderr
    assert "the hub answered 503" in (tmp_path / "online" / "output_dir" / "run.log").read_text()
    server.stop()
    offline = cfsp("offline", *words, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert figures(tmp_path, "offline") == figures(tmp_path, "online")


@pytest.mark.slow
def test_the_papers_evaluation_by_lm_evals_own_names(cfsp, server, tmp_path):
    words = [
        "calibration=c4", "evaluation=paper", "evaluation.perplexity.datasets=[wikitext2,c4,fineweb_edu]",
        "evaluation.zero_shot.limit=4", "evaluation.cost.prompt_tokens=32", "evaluation.cost.new_tokens=4",
        "evaluation.cost.repeats=1", "recovery=lora", "recovery/data=alpaca", "recovery.data.n_samples=8",
        "recovery.max_steps=2", "recovery.warmup_steps=0",
    ]  # fmt: skip
    server.fault(fail_after=20_000, match="parquet", times=2)
    online = cfsp("online", *words)
    assert online.returncode == 0, online.stderr
    found = figures(tmp_path, "online")
    assert {data for _, data, _ in found} == {"wikitext2", "c4", "fineweb_edu", *TASKS}
    assert {side for side, *_ in found} == {"dense", "pruned", "recovered"}
    server.stop()
    offline = cfsp("offline", *words, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert figures(tmp_path, "offline") == found


@pytest.mark.slow
def test_task_data_that_cannot_be_fetched(cfsp, server, tmp_path):
    """Each line names the key that the task stands under, the task, the cause and the way out."""
    server.gated, server.token = {"google-research-datasets/nq_open"}, "hf_right"
    words = ["calibration=bundled", "evaluation=tables", "evaluation.perplexity=null", "evaluation.cost=null"]
    words += ["evaluation.few_shot=null", "evaluation.zero_shot=null", "evaluation.generation.limit=2"]
    gated = cfsp("gated", *words)
    (line,) = [line for line in gated.stderr.splitlines() if line.startswith("cfsp: ")]
    for part in ("evaluation.generation.tasks=nq_open", "gated", "accept its licence", "HF_TOKEN", "include_path"):
        assert part in line
    assert gated.returncode == 2
    assert cfsp("right", *words, HF_TOKEN="hf_right").returncode == 0
