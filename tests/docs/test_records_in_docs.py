"""What README.md and docs/ show is what the committed records and tables say."""

from __future__ import annotations

import json
import math
import re
from statistics import mean, stdev

import pytest
from rich.console import Console

from cfsp.record.run_record import RunRecord
from cfsp.sweep.experiment import experiment_names
from cfsp.tables.summary import summary_table
from tests.conftest import ROOT
from tests.helpers.documents import FENCES, PAGES, folder_text, without_fences


def test_the_demo_table_is_the_committed_record():
    record = RunRecord.read(ROOT / "results" / "records" / "demo" / "record.json")
    console = Console(width=100, highlight=False)
    with console.capture() as captured:
        console.print(summary_table(record))
    shown = [line.rstrip() for line in captured.get().rstrip().splitlines()]
    assert "\n".join(shown) + "\n" in [fence.content for fence in FENCES if fence.page == "docs/quickstart.md"]


def test_the_committed_record_holds_no_place_of_a_machine():
    text = (ROOT / "results" / "records" / "demo" / "record.json").read_text()
    assert not re.search(r'"(/|[A-Z]:\\\\)', text)
    assert json.loads(text)["environment"]["git"]["dirty"] is False


def _plain_cells(line: str) -> list[str]:
    return [re.sub(r"\*\*|</?u>|`", "", cell).strip() for cell in line.strip().strip("|").split("|")]


def test_the_table_of_pruners_is_that_of_its_experiment():
    """One row of the page is the three rows of the experiment's table, one for each ratio."""
    source = (ROOT / "results" / "tables" / "one_budget" / "bundled" / "main.md").read_text(encoding="utf-8")
    rows: dict[str, list[str]] = {}
    for section in re.findall(r"^\*\*model.*\*\*\n\n((?:\|.*\n)+)", source, re.MULTILINE):
        for method, *figures in map(_plain_cells, section.splitlines()[2:]):
            rows.setdefault(method, []).extend(figures)
    assert len(rows) == 15
    for method, figures in rows.items():
        assert f"| {method} | {' | '.join(figures)} |" in PAGES["docs/results.md"]


def _recoveries() -> dict[tuple[str, str], dict[str, list[float]]]:
    """(data, recovery at its best rate) -> perplexity and gap to dense in log-perplexity, a value for each seed."""
    best = {("bundled", "ig_lora"): 0.001, ("self", "ig_lora"): 0.003}
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for path in sorted((ROOT / "results" / "records" / "recovery_rates" / "bundled").glob("*.json")):
        record = RunRecord.read(path)
        assert record is not None
        assert record.environment["git"]["dirty"] is False
        settings = record.configuration["recovery"]
        if record.configuration["evaluation"]["perplexity"]["windows"] != [16, 49]:
            assert record.identity["seed"] == 100
            continue
        name, data = settings.get("name", "none"), (settings.get("data") or {}).get("name", "")
        if settings.get("learning_rate") != best.get((data, name), settings.get("learning_rate")):
            continue
        name += " recovery.objective=distill" if settings.get("objective") == "distill" else ""
        dense, side = (
            next(row["value"] for row in record.measurements[side] if row["metric"] == "perplexity")
            for side in ("dense", "recovered" if record.recovery else "pruned")
        )
        entry = values.setdefault((data, name), {"perplexity": [], "gap": []})
        entry["perplexity"].append(side)
        entry["gap"].append(math.log(side / dense))
    return values


def test_the_tables_of_recoveries_are_their_committed_records():
    values = _recoveries()
    none = values.pop(next(key for key in values if key[1] in ("none", "")))
    assert {key[0] for key in values} == {"bundled", "self"}
    assert len(values) == 10
    for (data, name), entry in values.items():
        assert len(entry["gap"]) == 3
        closed = 1 - mean(entry["gap"]) / mean(none["gap"])
        shown = f"{mean(entry['perplexity']):.2f} ± {stdev(entry['perplexity']):.2f} | {closed:.0%} |"
        part = PAGES["docs/recovery.md"].partition(f"`recovery/data={data}`:")[2].partition("\n\n`recovery/data=")[0]
        (row,) = [line for line in part.splitlines() if line.startswith(f"| `{name}` |")]
        assert row.endswith(shown), (data, name)


def test_lora_gains_more_than_three_standard_deviations():
    values = _recoveries()
    none = values.pop(next(key for key in values if key[1] in ("none", "")))["perplexity"]
    for key, entry in values.items():
        spread = max(stdev(entry["perplexity"]), stdev(none))
        assert mean(none) - mean(entry["perplexity"]) > 3 * spread, key


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
    assert {name for name, _, _ in rows} == set(experiment_names())
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


def test_the_page_on_sweeps_names_every_experiment():
    text = PAGES["docs/sweeps-and-tables.md"]
    assert not [name for name in experiment_names() if f"`{name}`" not in text]


def test_the_cost_table_is_that_of_the_benchmarks():
    rows = re.findall(r"^\|.*\| (.+) \| `(benchmark_\w+\.md)` \|$", PAGES["docs/large-models.md"], re.MULTILINE)
    assert len(rows) == 10
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
