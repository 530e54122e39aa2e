"""One damaged record among many is skipped by name, whatever is wrong, and the tables of the others come out."""

from __future__ import annotations

import json
import os

import pytest

from cfsp.cli import tables as command
from cfsp.record.run_record import RunRecord
from cfsp.sweep.composer import GridComposer
from cfsp.sweep.request import read_request
from cfsp.tables.collection import collect_records, configuration_key
from tests.conftest import ROOT
from tests.helpers.records import cell_of, record_of


def _changed(path, *keys, value):
    record = json.loads(path.read_text())
    place = record
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(record))


def _a_fifo(path):
    path.unlink()
    os.mkfifo(path)


def _a_folder(path):
    path.unlink()
    path.mkdir()


FIGURE = ("measurements", "dense", 0)
DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:500]),
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "empty": lambda path: path.write_bytes(b""),
    "a list": lambda path: path.write_text("[]"),
    "nested": lambda path: path.write_text("[" * 100_000 + "]" * 100_000),
    "deep": lambda path: _changed(path, "calibration", value=json.loads('{"a":' * 60 + "1" + "}" * 60)),
    "huge": lambda path: path.write_bytes(b" " * 50_000_001),
    "a FIFO": _a_fifo,
    "a folder": _a_folder,
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "another schema": lambda path: _changed(path, "schema", value=99),
    "a key more": lambda path: _changed(path, "colour", value="red"),
    "status": lambda path: _changed(path, "status", value=["success"]),
    "run_id": lambda path: _changed(path, "run_id", value="=1+1\n\\input"),
    "half a character": lambda path: _changed(path, "environment", "cpu", value="\ud800"),
    "gpus": lambda path: _changed(path, "environment", "gpus", value=3),
    "git": lambda path: _changed(path, "environment", "git", value={"commit": 5}),
    "packages": lambda path: _changed(path, "environment", "packages", value=None),
    "seed": lambda path: _changed(path, "configuration", "seed", value="0"),
    "save": lambda path: _changed(path, "configuration", "save", value=[]),
    "NaN": lambda path: _changed(path, *FIGURE, "value", value=float("nan")),
    "a large number": lambda path: _changed(path, *FIGURE, "value", value=10**400),
    "a window": lambda path: _changed(path, *FIGURE, "seq_len", value=[256]),
    "a detail": lambda path: _changed(path, *FIGURE, "detail", value="x"),
    "a task": lambda path: _changed(path, *FIGURE, "task", value={}),
    "stages": lambda path: _changed(path, "stages", value=[{"name": "plan", "seconds": "1"}]),
    "blocks": lambda path: _changed(path, "blocks", value=[{"width": 1, "base_width": 0, "distance": {}}]),
    "the plan": lambda path: _changed(path, "plan", "achieved", value={"ratio": None}),
    "the recovery": lambda path: _changed(path, "recovery", value=[1]),
}  # fmt: skip


@pytest.fixture(scope="module")
def cells():
    return [cell_of(pruner, seed) for pruner in ("cfsp", "flap") for seed in (0, 1)]


@pytest.fixture(scope="module")
def composer():
    return GridComposer()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_skipped_by_name(tmp_path, cells, composer, damage):
    for at, cell in enumerate(cells):
        record_of(cell, 50.0 + at, recovery=None, calibration=None).write(tmp_path / f"{at}.json")
    DAMAGE[damage](tmp_path / "2.json")
    collection = collect_records(cells, tmp_path, composer)
    (line,) = collection.damaged
    assert line.startswith(f"{tmp_path / '2.json'}: not a")
    assert len(line) < 500
    assert [one.cell for one in collection.runs] == [*cells[:2], cells[3]]


def test_every_committed_record_is_whole():
    for path in sorted((ROOT / "results" / "records").rglob("*.json"))[::10]:
        record = RunRecord.read(path)
        assert record is not None
        assert record.succeeded, (path, record.problem())


@pytest.mark.parametrize("name", ["single_shot", "neuron_metric", "recovery"])
def test_a_grid_is_composed_as_hydra_composes_each_run(name):
    from cfsp.config.compose import compose
    from cfsp.config.parse import parse

    cells, composer = read_request([f"experiment={name}"]).cells, GridComposer()
    for cell in cells[:: max(1, len(cells) // 4)]:
        ours, theirs = composer.config(cell.overrides), parse(compose(cell.overrides))
        assert json.dumps(ours.raw) == json.dumps(theirs.raw)
        assert ours == theirs
        assert configuration_key(ours.raw) == configuration_key(theirs.raw)


@pytest.mark.parametrize(
    "words",
    [
        ("importance=random", "seed=3"), ("evaluation.zero_shot=null",), ("sparsity={ratio: 0.3}",),
        ("~evaluation.cost",),
        ("+importance.x=1",), ("sparsity.ratoi=0.3",), ("paths.output_dir=${model.name}",), ("seed=[1",),
        ("model=nope",),
        ("sparsity.ratio=0.3", "pruner=flap", "calibration.path=null"), ("evaluation.perplexity.windows=[0,4]",),
    ],
    ids=str,
)  # fmt: skip
def test_whatever_the_words_are_the_composer_answers_as_hydra_does(words):
    from cfsp.config.compose import compose
    from cfsp.config.parse import parse
    from cfsp.errors import ConfigError

    words = (*words, "paths.output_dir=o") if "paths" not in words[0] else words

    def answer(make):
        try:
            return json.dumps(make().raw)
        except ConfigError as error:
            return str(error)

    assert answer(lambda: GridComposer().config(words)) == answer(lambda: parse(compose(words)))


def test_what_nobody_foresaw_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(command, "load_results", lambda *_: {}["\x1b[31mgone"])
    assert command.main(["experiment=single_shot"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "tables: failed (KeyError: '\\x1b[31mgone'); debug=true shows where"
    assert command.main(["experiment=single_shot", "debug=true"]) == 1
    assert "Traceback" in capsys.readouterr().err
