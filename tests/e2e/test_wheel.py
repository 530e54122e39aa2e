"""A wheel built from the repository runs the same job elsewhere: conf and assets travel with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, unpacked outside the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_conf_and_assets_travel_and_nothing_else_does(installed):
    for name in ("py.typed", "conf/config.yaml", "conf/pruner/cfsp.yaml", "assets/books7m/model.safetensors"):
        assert (installed / "cfsp" / name).is_file(), name
    kinds = ("text/evaluation.txt", "tasks/books_cloze.jsonl", "tasks/books_cloze.yaml")
    for kind in (*kinds, "report/page.html", "report/page.css", "report/page.js"):
        assert (installed / "cfsp" / "assets" / kind).is_file(), kind
    assert sorted(path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")) == ["cfsp"]


def test_the_installed_wheel_runs_the_main_job(installed, tmp_path):
    words = [
        "evaluation.zero_shot=null",
        "evaluation.cost=null",
        "logger=none",
        "paths.output_dir=out",
        "calibration.n_samples=8",
    ]
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    where = subprocess.run(
        [sys.executable, "-c", "import cfsp; print(cfsp.__file__)"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.strip().startswith(str(installed))
    done = subprocess.run(
        [sys.executable, "-m", "cfsp.run", *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "perplexity, bundled" in done.stdout
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["status"] == "success"
    assert record["environment"]["git"] is None
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
