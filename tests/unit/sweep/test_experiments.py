"""Every experiment that ships: its grid in each variant, its layout; and what is refused about experiments."""

from __future__ import annotations

import pytest

from cfsp.cli import sweep
from cfsp.config.components import build
from cfsp.config.compose import compose
from cfsp.config.contracts import Launcher
from cfsp.config.parse import parse
from cfsp.errors import ConfigError
from cfsp.sweep import request as command
from cfsp.sweep.experiment import (
    Experiment,
    experiment_folder,
    experiment_names,
    load_experiment,
    override_values,
    read_experiment,
)
from cfsp.system.package import config_folder
from cfsp.tables.layout import load_layout
from tests.conftest import ROOT

EXPERIMENTS = experiment_names()


def test_experiments_and_their_folders_are_the_same():
    folders = sorted(path.name for path in (ROOT / "experiments").iterdir() if path.is_dir())
    assert folders == EXPERIMENTS
    assert all((ROOT / "experiments" / name / "README.md").is_file() for name in folders)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_override_of_every_variant_composes_and_parses(name):
    experiment = load_experiment(name)
    assert {"bundled", "paper"} <= set(experiment.variants)
    for variant in experiment.variants:
        cells = experiment.cells(variant)
        assert len({str(cell) for cell in cells}) == len(cells)
        seen: set[str] = set()
        for cell in cells:
            if not seen.issuperset(cell.overrides):  # every word once: the rest are combinations of these
                parse(compose(cell.overrides))
                seen.update(cell.overrides)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_layouts_name_keys_of_the_grid(name):
    layout, experiment = load_layout(ROOT / "experiments" / name), load_experiment(name)
    assert layout.tables
    keys = {key for variant in experiment.variants for cell in experiment.cells(variant) for key in cell.point}
    named = [key for table in layout.tables.values() for key in [*table.groups, *table.rows, *table.where]]
    named += [key for figure in layout.reported for key in figure.where]
    named += [key for figure in layout.figures.values() for key in [*figure.lines, *figure.panels, *figure.where]]
    assert set(named) <= keys


@pytest.mark.parametrize("option", sorted(path.stem for path in (config_folder() / "launcher").glob("*.yaml")))
def test_every_launcher_instantiates(option):
    assert command._launcher({"launcher": option}).launch


def test_a_grid_is_the_product_of_each_entry_and_variants_replace():
    experiment = Experiment(
        name="x",
        title="x",
        runs=[{"a": [1, 2], "b": "c"}, {"arm": {"one": ["d=1", "e=2"], "two": []}, "a": 1}],
        variants={"v": {"seed": [0, 1]}, "w": {"a": 3}},
    )
    assert [str(cell) for cell in experiment.cells("v")] == [
        "a=1 b=c seed=0", "a=1 b=c seed=1", "a=2 b=c seed=0", "a=2 b=c seed=1",
        "d=1 e=2 a=1 seed=0", "d=1 e=2 a=1 seed=1", "a=1 seed=0", "a=1 seed=1",
    ]  # fmt: skip
    assert [str(cell) for cell in experiment.cells("w")] == ["a=3 b=c", "d=1 e=2 a=3", "a=3"]
    assert experiment.cells("v")[4].point == {"arm": "one", "a": "1", "seed": "0"}
    assert [str(cell) for cell in experiment.cells("w", {"a": ["5", "6"]})][:2] == ["a=5 b=c", "a=6 b=c"]


def test_values_reach_the_runs_unchanged():
    long = "/" + "x" * 300
    experiment = Experiment(name="x", title="x", runs=[{"a": 1, "b": True, "c": None, "d": 0.5}], variants={"v": {}})
    (cell,) = experiment.cells("v", override_values([f"e={long}", "f='two  words'"]))
    assert cell.overrides == ("a=1", "b=true", "c=null", "d=0.5", f"e={long}", "f='two  words'")


def test_overrides_of_the_command_line():
    assert override_values(["a=1", "b=x,y", "c=[1,2]", "d=null"]) == {
        "a": "1",
        "b": ["x", "y"],
        "c": "[1,2]",
        "d": "null",
    }
    assert override_values(["~a"]) == {"a": []}
    for wrong in ("a", "a=[", "=3"):
        with pytest.raises(ConfigError, match="write key=value"):
            override_values([wrong])


def _refused(capsys, *words: str) -> str:
    assert sweep.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sweep: ")
    return line


def test_wrong_command_lines_are_refused_in_one_line(capsys, tmp_path):
    places = [f"paths.{key}={tmp_path / key}" for key in ("output_dir", "records_dir", "cache_dir")]
    assert "experiment=singel_shot: there is no such experiment; did you mean single_shot?" in _refused(
        capsys, "experiment=singel_shot"
    )
    assert "experiment is not set" in _refused(capsys, "variant=paper")
    line = _refused(capsys, "experiment=single_shot", "variant=papre")
    assert "variant=papre: experiment=single_shot has no such variant; did you mean paper?" in line
    line = _refused(capsys, "experiment=single_shot", "pruner=cfps", *places)
    assert "pruner=cfps: there is no such option; did you mean cfsp?" in line
    assert "sparsity.ratoi: there is no such key" in _refused(
        capsys, "experiment=single_shot", "sparsity.ratoi=0.5", *places
    )
    assert "launcher=slrum: there is no such launcher" in _refused(capsys, "experiment=single_shot", "launcher=slrum")
    line = _refused(capsys, "experiment=single_shot", "launcher=local", "launcher.processes=0")
    assert "launcher.processes=0" in line
    assert "status=maybe: use true or false" in _refused(capsys, "experiment=single_shot", "status=maybe")
    line = _refused(capsys, "experiment=single_shot", "model=local", "model.path=/nowhere", *places)
    assert "model.path=/nowhere: no such folder" in line
    assert not (tmp_path / "records_dir").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("runs: [{a: 1}]\nvariants: {v: {}}", "title is not set"),
        ("title: x\nruns: []\nvariants: {v: {}}", "runs="),
        ("title: x\nruns: [{a: 1}]\nvariants: {v: {}}\ntabels: 1", "tabels=1: unknown key"),
        ("title: x\nruns: [{a: {b: 1}}]\nvariants: {v: {}}", "runs"),
        ("title: [", "not a YAML file"),
        ("- 1", "mapping"),
    ],
)
def test_an_invalid_grid_file_is_refused(tmp_path, text, said):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/grid.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_experiment(tmp_path / "x/grid.yaml")


def test_an_experiment_or_launcher_given_to_a_single_run_is_explained(refused):
    (line,) = refused("experiment=single_shot")
    assert "cfsp sweep experiment=single_shot" in line


def test_a_launcher_is_a_class_with_launch():
    with pytest.raises(ConfigError, match="no class for launcher"):
        build("launcher", {"_target_": "cfsp.logger.base.NullLogger"}, contract=Launcher)


def test_a_variant_may_have_entries_of_its_own(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "grid.yaml").write_text(
        "title: t\nruns: [{pruner: cfsp}]\nvariants: {bundled: {seed: 0}, other: {seed: 1}}\n"
        "variant_runs: {other: [{pruner: [flap, random]}]}\n"
    )
    experiment = read_experiment(folder / "grid.yaml")
    assert [str(cell) for cell in experiment.cells("bundled")] == ["pruner=cfsp seed=0"]
    assert [str(cell) for cell in experiment.cells("other")] == ["pruner=flap seed=1", "pruner=random seed=1"]
    (folder / "grid.yaml").write_text(
        "title: t\nruns: [{pruner: cfsp}]\nvariants: {bundled: {seed: 0}}\nvariant_runs: {x: [{pruner: flap}]}\n"
    )
    with pytest.raises(ConfigError, match="variant_runs.x"):
        read_experiment(folder / "grid.yaml")


def test_a_layout_may_have_tables_for_some_variants():
    layout = load_layout(experiment_folder("single_shot", "tables.yaml"))
    assert set(layout.for_variant("smollm2").tables) == {"scopes"}
    assert set(layout.for_variant("bundled").tables) == {"main"}
