"""A component of every kind in a package outside of cfsp works fully, without an edit in cfsp."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from cfsp.config.compose import compose
from cfsp.config.identity import method_of
from cfsp.config.parse import parse
from cfsp.errors import ConfigError
from cfsp.sweep.experiment import Cell
from tests.conftest import ROOT, mentions

PLUGINS = ROOT / "tests" / "plugins"
CONF = PLUGINS / "outside_package" / "conf"
ALLOW = "plugins.allow=[outside_package]"
#: As ``--config-dir`` puts it into a composed configuration.
SEARCH = f"hydra.searchpath=[file://{CONF}]"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(PLUGINS)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


@pytest.fixture
def record(run_cfsp, sound_words, tmp_path):
    """Run with more words; returns the record."""

    def call(*words: str) -> dict:
        code, _, err = run_cfsp("--config-dir", str(CONF), *sound_words, ALLOW, *words)
        assert code == 0, err
        return json.loads((tmp_path / "out" / "record.json").read_text())

    return call


def _method(*words: str) -> dict:
    return method_of(parse(compose([SEARCH, ALLOW, *words])))


# The pruner


def test_a_pruner_runs_and_its_record_names_it(record, tmp_path):
    made = record("pruner=every_other")
    assert made["method"]["name"] == "every_other"
    assert made["method"]["pruner"]["class"] == "outside_package.pruner.EveryOther"
    assert len(made["method"]["pruner"]["source"]) == 64
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert [block["ffn_kept"] for block in plan["blocks"]] == [list(range(0, 64, 2))] * 2


def test_a_pruner_says_which_of_its_settings_decide():
    assert _method("pruner=every_other") == _method("pruner=every_other", "pruner.comment=x")
    assert _method("pruner=every_other") != _method("pruner=every_other", "pruner.bias=true")
    assert "comment" not in _method("pruner=every_other")["pruner"]


def test_tables_match_records_by_the_settings_that_decide(record, sound_words, tmp_path):
    from cfsp.tables.collection import collect_records

    made = record("pruner=every_other", "pruner.comment=later")
    for module in [name for name in sys.modules if name.startswith("outside_package")]:
        del sys.modules[module]  # a fresh process has not imported it
    words = (*sound_words, SEARCH, ALLOW, "pruner=every_other")
    same, other = Cell(words, {}), Cell((*words, "pruner.bias=true"), {})
    collection = collect_records([same, other], tmp_path / "records")
    assert [(found.cell, found.record.run_id) for found in collection.runs] == [(same, made["run_id"])]
    assert (collection.missing, collection.damaged) == ([other], [])


def test_inspect_counts_what_a_pruner_states_and_says_what_it_does_not(capsys):
    from cfsp.cli.inspect import main

    assert main(["model=bundled", f"config_dir={CONF}", ALLOW, "json=true"]) == 0
    reaches = {reach["pruner"]: reach for reach in json.loads(capsys.readouterr().out)["pruners"]}
    assert reaches["every_other"]["units"] == {"neurons": 8 * 768}
    assert reaches["every_other"]["parameters"] == 8 * 384 * 768
    assert reaches["every_other"]["largest_ratio"] == 0.5
    assert reaches["silent"]["units"] is None
    assert reaches["silent"]["largest_ratio"] == 0.75
    assert main(["model=bundled", f"config_dir={CONF}", ALLOW]) == 0
    assert "units: not stated by this pruner" in capsys.readouterr().out
    assert main(["model=bundled", f"config_dir={CONF}"]) == 2
    assert "plugins.allow=[outside_package]" in capsys.readouterr().err


def test_an_export_that_cannot_hold_a_pruner_s_biases_is_refused_before_the_run(refused, sound_words):
    words = ["--config-dir", str(CONF), *sound_words, ALLOW, "save.model=true", "save.format=decilm"]
    lines = refused(*words, "pruner=every_other", "pruner.bias=true")
    mentions(lines, "save.format=decilm", "adds biases")


def test_a_pruner_that_states_nothing_runs_and_this_is_said(record, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        made = record("pruner=silent", "save.model=true", "save.format=padded")
    said = [line for line in caplog.messages if "not stated by this pruner (pruner=silent)" in line]
    assert [line.partition(":")[0] for line in said] == ["save.format=padded", "removed_units"]
    assert made["checkpoint"]["export"]["form"] == "padded"
    assert (tmp_path / "out" / "model-padded" / "config.json").is_file()


def test_a_required_member_that_is_missing_is_named():
    with pytest.raises(ConfigError) as refusal:
        parse(compose([ALLOW, "pruner=none", "pruner._target_=outside_package.pruner.WithoutPlan"]))
    mentions([str(refusal.value)], "pruner._target_=outside_package.pruner.WithoutPlan", "it has no plan")


# The other kinds


def test_an_allocator_decides_the_widths(record):
    made = record("pruner=uniform", "allocator._target_=outside_package.allocator.Rising", "+allocator.slope=0.25")
    assert [row["width"] for row in made["blocks"]] == [24, 40]
    assert made["method"]["allocator"]["slope"] == 0.25
    assert made["method"]["allocator"]["class"] == "outside_package.allocator.Rising"


def test_a_metric_decides_the_kept_units(record, tmp_path):
    record("pruner=uniform", "importance._target_=outside_package.metric.LastFirst")
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert [block["ffn_kept"] for block in plan["blocks"]] == [list(range(32, 64))] * 2


def test_settings_of_a_metric_count_in_the_identity_as_their_fields_are_marked(tmp_path):
    def identity(*words: str) -> dict:
        return _method("pruner=uniform", "importance._target_=outside_package.metric.LastFirst", *words)["importance"]

    for name, content in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).write_text(content)
    plain, first = identity(), identity(f"+importance.table={tmp_path / 'a'}")
    assert set(plain) == {"class", "source", "sign", "table"}
    assert identity("+importance.comment=x", "+importance.power=1") == plain
    assert identity("+importance.sign=-1") != plain
    assert identity("+importance.power=2") == plain | {"power": 2.0}
    assert len(first["table"]) == 64
    assert identity(f"+importance.table={tmp_path / 'b'}") == first
    assert identity(f"+importance.table={tmp_path / 'c'}") != first


def test_a_recovery_changes_the_model_and_is_part_of_the_identity(record):
    made = record("recovery._target_=outside_package.recovery.Scale", "+recovery.factor=2")
    assert made["recovery"] == {"name": "scale", "factor": 2.0}
    assert made["run_id"].split("-")[-2] == "scale"
    assert made["identity"]["recovery"]["factor"] == 2.0


def test_an_evaluator_measures_before_and_after_a_recovery(record):
    made = record(
        "recovery._target_=outside_package.recovery.Scale", "+recovery.factor=2",
        "+evaluation.weights._target_=outside_package.evaluator.WeightSum",
    )  # fmt: skip
    values = {side: rows[0]["value"] for side, rows in made["measurements"].items()}
    assert set(values) == {"dense", "pruned", "recovered"}
    assert values["recovered"] == pytest.approx(2 * values["pruned"])


def test_an_evaluator_that_compares_sides_has_to_measure_them(refused, sound_words):
    words = ["+evaluation.weights._target_=outside_package.evaluator.Promises", ALLOW]
    mentions(refused(*sound_words, *words), "evaluation.weights._target_=", "no measure_sides")


def test_a_launcher_runs_a_sweep(tmp_path, sound_words, capsys):
    from cfsp.cli import sweep as command

    places = [f"paths.{key}={tmp_path / key}" for key in ("output_dir", "records_dir", "cache_dir")]
    words = [word for word in sound_words if not word.startswith(("evaluation", "save"))]
    given = [
        "experiment=calibration_set", *words, "evaluation=none", "~evaluation.cost", "logger=none", "seed=0",
        "pruner=uniform,cfsp", "sparsity.ratio=0.5", *places, ALLOW,
        "launcher._target_=outside_package.launcher.Backwards",
    ]  # fmt: skip
    assert command.main(given) == 0, capsys.readouterr().err
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert ["cfsp" in line for line in lines] == [True, False]
    assert len(list((tmp_path / "records_dir").glob("*.json"))) == 2
