"""The parts that docs/extending.md writes in a package of their own run as it says."""

from __future__ import annotations

import json
import sys

import pytest

from tests.conftest import ROOT
from tests.helpers.documents import FENCES, PAGES, words_of

PAGE = "docs/extending.md"
#: Small settings for every run.
_SMALL = ("calibration.n_samples=4", "save.model=false")
_WITHOUT = ("evaluation=none",)

pytestmark = pytest.mark.skipif(
    not (ROOT / "cfsp" / "cli").is_dir(), reason="the page names the modules of the new layout"
)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The package and the configuration folder of the page, in the working folder."""
    for fence in FENCES:
        if fence.page == PAGE and fence.file:
            path = tmp_path / fence.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(fence.content, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in [name for name in sys.modules if name == "mine" or name.startswith("mine.")]:
        monkeypatch.delitem(sys.modules, name)


def _command(group: str) -> list[str]:
    """The overrides of the command line that shows ``group``."""
    (line,) = [
        line
        for fence in FENCES
        if fence.page == PAGE and fence.language == "sh"
        for line in fence.content.splitlines()
        if line.startswith("cfsp --config-dir") and f" {group}=" in line
    ]
    return words_of(line)[1:]


def _record(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "record.json").read_text(encoding="utf-8"))


def test_the_headings_are_the_same_for_each_kind():
    kinds = PAGES[PAGE].split("\n## ")[1:]
    assert len(kinds) == 7
    for kind in kinds:
        heads = [part.partition(".**")[0] for part in kind.split("\n**")[1:]]
        assert heads == ["What it does", "Contract", "Class", "YAML", "Run"], kind.partition("\n")[0]


@pytest.mark.usefixtures("mine")
def test_an_importance_metric(run_cfsp, tmp_path):
    code, _, err = run_cfsp(*_command("importance"), *_SMALL, *_WITHOUT)
    assert code == 0, err
    assert _record(tmp_path)["method"]["importance"]["power"] == 1.5


@pytest.mark.usefixtures("mine")
def test_an_allocator(run_cfsp, tmp_path):
    code, _, err = run_cfsp(*_command("allocator"), *_SMALL, *_WITHOUT)
    assert code == 0, err
    widths = [len(block["ffn_kept"]) for block in json.loads((tmp_path / "out" / "plan.json").read_text())["blocks"]]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1]


@pytest.mark.usefixtures("mine")
def test_a_pruner(run_cfsp, tmp_path):
    code, _, err = run_cfsp(*_command("pruner"), *_SMALL, *_WITHOUT)
    assert code == 0, err
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert all(block["ffn_kept"] == list(range(384)) for block in plan["blocks"])
    assert plan["achieved"]["ratio"] == 0.5


@pytest.mark.usefixtures("mine")
def test_a_recovery(run_cfsp, tmp_path):
    code, _, err = run_cfsp(*_command("recovery"), *_SMALL, *_WITHOUT)
    assert code == 0, err
    assert _record(tmp_path)["recovery"]["factor"] == 1.05


@pytest.mark.usefixtures("mine")
def test_an_evaluator(run_cfsp, tmp_path):
    code, _, err = run_cfsp(*_command("evaluation"), *_SMALL)
    assert code == 0, err
    figures = {side: figures[0] for side, figures in _record(tmp_path)["measurements"].items()}
    assert {side: (figure["metric"], figure["n"]) for side, figure in figures.items()} == {
        "dense": ("entropy", 128), "pruned": ("entropy", 128),
    }  # fmt: skip
    assert 0 < figures["dense"]["value"] < 12


@pytest.mark.usefixtures("mine")
def test_a_logger(run_cfsp, tmp_path):
    code, _, err = run_cfsp(*_command("logger"), *_SMALL, *_WITHOUT)
    assert code == 0, err
    assert json.loads((tmp_path / "runs.jsonl").read_text())["status"] == "success"


@pytest.mark.usefixtures("mine")
def test_a_launcher(run_cfsp, tmp_path):
    (line,) = [
        line
        for fence in FENCES
        if fence.page == PAGE
        for line in fence.content.splitlines()
        if line.startswith("cfsp sweep") and "launcher._target_=mine" in line
    ]
    places = [f"paths.{key}={tmp_path / key}" for key in ("output_dir", "records_dir", "cache_dir")]
    small = ["calibration.n_samples=2,4", "evaluation=none", "~evaluation.cost", "~evaluation.zero_shot", "seed=0"]
    code, out, err = run_cfsp(*words_of(line)[1:], *places, *small, "logger=none", defaults=False)
    assert code == 0, err
    ended = [line for line in out.splitlines() if line.startswith("[")]
    assert ["n_samples=4" in line for line in ended] == [True, False]
