"""What README.md and docs/ show is what the committed records and tables say."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
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
from tests.documents import FENCES, PAGES, folder_text, without_fences

_spec = importlib.util.spec_from_file_location("compare_recoveries", ROOT / "scripts" / "compare_recoveries.py")
compare_recoveries = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(compare_recoveries)


def test_the_demo_table_is_the_committed_record():
    record = RunRecord.read(ROOT / "results" / "records" / "demo" / "record.json")
    console = Console(width=100, highlight=False)
    with console.capture() as captured:
        console.print(summary(record))
    shown = [line.rstrip() for line in captured.get().rstrip().splitlines()]
    assert "\n".join(shown) + "\n" in [fence.content for fence in FENCES if fence.page == "docs/quickstart.md"]


def test_the_committed_record_holds_no_place_of_a_machine():
    text = (ROOT / "results" / "records" / "demo" / "record.json").read_text()
    assert not re.search(r'"(/|[A-Z]:\\\\)', text)
    assert json.loads(text)["environment"]["git"]["dirty"] is False


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
            assert table.split("\n\nremoved")[0] in PAGES["docs/results.md"]


def test_the_tables_of_recoveries_are_their_committed_records():
    folder = ROOT / "results" / "records" / "recoveries"
    shown = compare_recoveries.page(folder)
    assert (ROOT / "results" / "tables" / "recoveries.md").read_text(encoding="utf-8") == shown
    for data in ("bundled", "self"):
        records = compare_recoveries.read(folder / data)
        order = ["none", "lora", "lora_matched", "ig_lora", "full"]
        table = recovery_table(records, Figure("perplexity", "bundled", "perplexity"), order)
        assert table in shown
        assert table in PAGES["docs/recovery.md"]
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
        for name, seeds in values.items():
            if name != "none":
                spread = max(stdev(seeds), stdev(values["none"]))
                assert mean(values["none"]) - mean(seeds) > 3 * spread, (data, name)


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


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


def _tables(text: str) -> list[tuple[list[str], str]]:
    """(rows, caption) of each table of a page; the caption is the paragraph in italics after it, or nothing."""
    return [
        (rows.strip().splitlines(), " ".join(caption.split()))
        for rows, caption in re.findall(r"((?:^\|.*\n)+)(?:\n(\*[^*]+\*))?", text, re.MULTILINE)
    ]


def _captioned() -> list[tuple[str, list[str], str]]:
    return [
        (page, rows, caption)
        for page, text in PAGES.items()
        for rows, caption in _tables(without_fences(text))
        if "results/" in caption
    ]


@pytest.mark.parametrize(("page", "rows", "caption"), _captioned())
def test_the_numbers_of_a_table_are_in_the_table_that_its_caption_names(page, rows, caption):
    """Numbers in brackets are worked out from others, and have a test of their own."""
    paths = [path.rstrip(".") for path in re.findall(r"results/(?:tables|records)/[\w./-]+", caption)]
    paths += [f"results/tables/{name}" for name in re.findall(r"`(benchmark_\w+\.md)`", caption)]
    paths = [path.replace("results/records/cfsp_plus", "results/tables/cfsp_plus") for path in paths]
    source = "\n".join(folder_text(ROOT / path) for path in paths)
    assert source, page
    for row in rows[2:]:
        for number in re.findall(r"\d+\.\d+", re.sub(r"\([^)]*\)|`[^`]*`", "", row.partition("|")[2])):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", source), (page, number)


def test_there_are_tables_with_captions():
    pages = ("docs/results.md", "docs/large-models.md", "docs/export-and-verify.md", "docs/sweeps-and-tables.md")
    assert {page for page, _, _ in _captioned()} >= {"README.md", *pages}


def test_the_headline_of_an_experiment_is_in_its_table():
    text = PAGES["docs/results.md"]
    section = text.partition("## One line for each experiment")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| ?([\w, ]*) \|$", section, re.MULTILINE)
    experiments = {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")}
    assert {name for name, _, _ in rows} == experiments
    for name, finding, commits in rows:
        folder = ROOT / "results" / "tables" / name
        if not folder.is_dir():
            assert not commits.strip()
            continue
        source = folder_text(folder)
        for number in re.findall(r"\d+\.\d{2,}|\d+,\d{3}", finding):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", source), (name, number)
        for commit in commits.split(", "):
            assert commit in source, (name, commit)


def test_the_cost_table_is_that_of_the_benchmarks():
    rows = re.findall(r"^\|.*\| (.+) \| `(benchmark_\w+\.md)` \|$", PAGES["docs/large-models.md"], re.MULTILINE)
    assert len(rows) == 8
    for numbers, file in rows:
        source = (ROOT / "results" / "tables" / file).read_text(encoding="utf-8")
        assert all(number in source for number in re.findall(r"\d+\.\d+", numbers)), (numbers, file)


def test_the_table_of_cfsp_plus_is_that_of_its_records():
    """The best of nine published settings, ours, and the share of its gap to dense that ours leaves."""
    for model in ("stories260K", "babyllama-1M", "books7m"):
        folder = ROOT / "results" / "records" / "cfsp_plus" / model
        values: dict[tuple[str, str], list[float]] = {}
        dense = set()
        for path in folder.glob("*.json"):
            record = json.loads(path.read_text(encoding="utf-8"))
            sides = {
                side: next(figure["value"] for figure in figures if figure["metric"] == "perplexity")
                for side, figures in record["measurements"].items()
            }
            dense.add(sides["dense"])
            settings = record["configuration"]
            method = str([settings[group] for group in ("pruner", "importance", "allocator")])
            if settings["pruner"]["name"] == "cfsp_plus":
                method = "ours"
            values.setdefault((str(settings["sparsity"]["ratio"]), method), []).append(sides["pruned"])
        (start,) = {round(value, 6) for value in dense}
        cells = [model, f"{start:.2f}"]
        for ratio in ("0.2", "0.35", "0.5"):
            means = {method: mean(seeds) for (at, method), seeds in values.items() if at == ratio}
            ours = means.pop("ours")
            assert len(means) == 9
            best = min(means.values())
            share = math.log(ours / start) / math.log(best / start)
            cells += [f"{best:.2f}", f"{ours:.2f} ({share:.2f})"]
        row = f"| {' | '.join(cells)} |"
        assert row in PAGES["docs/results.md"]
        assert re.sub(r" \(.*?\)", "", row) in PAGES["README.md"]
