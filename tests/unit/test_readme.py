"""What the README shows must be what the committed record says, and its commands must exist."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from statistics import mean, stdev

import pytest
from rich.console import Console

from cfsp.record.run_record import RunRecord
from cfsp.tables.methods import Figure, label, method_table
from cfsp.tables.recoveries import label as recovery_label
from cfsp.tables.recoveries import recovery_table
from cfsp.tables.summary import summary
from tests.conftest import ROOT

_spec = importlib.util.spec_from_file_location("compare_recoveries", ROOT / "scripts" / "compare_recoveries.py")
compare_recoveries = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(compare_recoveries)

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_demo_table_is_the_committed_record():
    record = RunRecord.read(ROOT / "results" / "records" / "demo" / "record.json")
    console = Console(width=100, highlight=False)
    with console.capture() as captured:
        console.print(summary(record))
    shown = [line.rstrip() for line in captured.get().rstrip().splitlines()]
    assert "\n".join(shown) in README


def test_the_committed_record_holds_no_place_of_a_machine():
    text = (ROOT / "results" / "records" / "demo" / "record.json").read_text()
    assert not re.search(r'"(/|[A-Z]:\\\\)', text)
    assert json.loads(text)["environment"]["git"]["dirty"] is False


def test_every_option_that_the_readme_names_exists():
    groups = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
    for group, options in re.findall(r"`?\b(\w+)=([\w.]+(?:\|[\w.]+)*)", README):
        if group in groups - {"importance"}:
            for option in options.split("|"):
                assert (ROOT / "conf" / group / f"{option}.yaml").is_file(), f"{group}={option}"


def test_the_tables_of_pruners_are_their_committed_records():
    folders = sorted(path for path in (ROOT / "results" / "records" / "pruners").iterdir())
    assert [folder.name for folder in folders] == ["books7m", "stories260K"]
    for folder in folders:
        records = [record for path in sorted(folder.glob("*.json")) if (record := RunRecord.read(path))]
        task = "bundled" if folder.name == "books7m" else "text"
        page = (ROOT / "results" / "tables" / f"pruners-{folder.name}.md").read_text(encoding="utf-8")
        order = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
        table = method_table(records, Figure("perplexity", task, "perplexity"), order)
        assert table in page
        assert not any(re.search(r'"(/|[A-Z]:\\\\)', path.read_text()) for path in folder.glob("*.json"))
        assert not any(record.environment["git"]["dirty"] for record in records)
        seeds = {(label(r), r.plan["requested"]["ratio"]): set() for r in records}
        for record in records:
            seeds[label(record), record.plan["requested"]["ratio"]].add(record.identity["seed"])
        assert set(map(frozenset, seeds.values())) == {frozenset({0, 1, 2})}
        if folder.name == "books7m":
            assert table.split("\n\nremoved")[0] in README


def test_the_tables_of_recoveries_are_their_committed_records():
    folder = ROOT / "results" / "records" / "recoveries"
    shown = compare_recoveries.page(folder)
    assert (ROOT / "results" / "tables" / "recoveries.md").read_text(encoding="utf-8") == shown
    for data in ("bundled", "self"):
        records = compare_recoveries.read(folder / data)
        order = ["none", "lora", "lora_matched", "ig_lora", "full"]
        table = recovery_table(records, Figure("perplexity", "bundled", "perplexity"), order)
        assert table in shown
        assert table in README
        tuning = compare_recoveries.read(folder / data / "tuning")
        assert len(records) == 3 * 6
        assert {record.identity["seed"] for record in records} == {0, 1, 2}
        assert {record.identity["seed"] for record in tuning} == {100}
        assert {r.identity["evaluation"]["perplexity"]["windows"][0] for r in records} == {16}
        assert {r.identity["evaluation"]["perplexity"]["windows"][1] for r in tuning} == {16}
        for record in [*records, *tuning, *compare_recoveries.read(folder / data / "one_rate")]:
            assert record.environment["git"]["dirty"] is False
            assert not re.search(r'"(/|[A-Z]:\\\\)', json.dumps(dataclasses.asdict(record)))


def test_lora_gains_more_than_three_standard_deviations():
    figure = Figure("perplexity", "bundled", "perplexity")
    for data in ("bundled", "self"):
        values: dict[str, list[float]] = {}
        for path in (ROOT / "results" / "records" / "recoveries" / data).glob("*.json"):
            record = RunRecord.read(path)
            assert record is not None
            value = figure.of(record, "recovered" if record.recovery else "pruned")
            values.setdefault(recovery_label(record), []).append(value)
        for name, found in values.items():
            if name != "none":
                spread = max(stdev(found), stdev(values["none"]))
                assert mean(values["none"]) - mean(found) > 3 * spread, (data, name)


def test_records_that_do_not_belong_together_are_refused():
    folder = ROOT / "results" / "records" / "recoveries" / "self"
    records = [record for path in sorted(folder.glob("*.json")) if (record := RunRecord.read(path))]
    figure = Figure("perplexity", "bundled", "perplexity")
    trained = next(record for record in records if record.recovery)
    trained.recovery["tokens"] += 1
    with pytest.raises(ValueError, match="one number of training tokens"):
        recovery_table(records, figure, [])
    with pytest.raises(ValueError, match="one set of seeds"):
        recovery_table([record for record in records if record is not trained], figure, [])
