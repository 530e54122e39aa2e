"""The examples of docs/examples run: scripts, the notebook, the metric in a package of its own; and the figure."""

from __future__ import annotations

import json
import runpy
import sys

import pytest

from tests.conftest import ROOT
from tests.helpers.documents import command_lines, words_of

EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture
def run_script(monkeypatch, tmp_path, capsys):
    """Run a script as its command line does, in this process and in an empty folder; returns what it prints."""

    def call(path, *words: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(path), *words])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_prune_in_python(run_script, tmp_path):
    out = run_script(EXAMPLES / "prune_in_python.py", "--windows", "4")
    assert "parameters: 7,344,384 -> 4,985,088" in out
    assert (tmp_path / "outputs" / "example" / "model" / "config.json").is_file()
    assert len(json.loads((tmp_path / "outputs" / "example" / "plan.json").read_text())["blocks"]) == 8


def test_compare_two_methods(run_script, tmp_path):
    text = (ROOT / "cfsp" / "assets" / "text" / "evaluation.txt").read_text(encoding="utf-8")[:12_000]
    (tmp_path / "mine.txt").write_text(text, encoding="utf-8")
    lines = run_script(EXAMPLES / "compare_two_methods.py", "--text", "mine.txt").splitlines()
    assert lines[0].startswith("mine.txt: ")
    perplexity = {line.split()[0]: float(line.split()[2]) for line in lines[1:]}
    assert perplexity["dense"] < perplexity["cfsp"] < perplexity["flap"]


def test_the_notebook(monkeypatch, tmp_path):
    import matplotlib

    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "look_at_a_plan.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec("".join(cell["source"]), names)
    curves = names["curves"]
    assert curves["coarse"] == sorted(curves["coarse"])
    assert all(coarse < uniform for coarse, uniform in zip(curves["coarse"], curves["uniform"], strict=True))


def test_a_metric_in_a_package_of_its_own(run_cfsp, monkeypatch, tmp_path):
    """The command of the page, with small settings."""
    (line,) = [line for page, line in command_lines() if page == "docs/examples/README.md" and "peak_metric" in line
               and line.startswith("cfsp")]  # fmt: skip
    monkeypatch.syspath_prepend(str(EXAMPLES / "add_a_metric"))
    monkeypatch.chdir(ROOT)
    code, _, err = run_cfsp(*words_of(line)[1:], "calibration.n_samples=4", "evaluation=none", "save.model=false")
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["method"]["importance"]["power"] == 1.5


def test_the_figure_of_the_readme(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import make_figures

    plan = make_figures.plan_of_the_bundled_model(windows=4)
    path = make_figures.draw(plan, tmp_path / "overview.png")
    assert path.read_bytes()[:4] == (ROOT / "docs" / "figures" / "overview.png").read_bytes()[:4] == b"\x89PNG"
