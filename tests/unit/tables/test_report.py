"""The report of a sweep: what stands on the page, that it is one file, and what is refused. The records are real."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from cfsp.cli import report
from cfsp.tables.page import _javascript_number
from tests.conftest import ROOT

WORDS = ["experiment=block_metric", "allocator.metric=angular,none", "sparsity.ratio=0.5", "seed=0,1"]
VOID = {"meta", "link", "img", "input", "br"}
HOSTILE = "</pre><script>alert('x')</script> & <img src=https://example.org/x>"


class Page(HTMLParser):
    """Elements with their attributes, and the text of each outermost tag of ``kept``; refuses unbalanced tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def every(self, attribute: str) -> list[str]:
        return [value for _, found in self.elements if (value := found.get(attribute)) is not None]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working folder with a layout and four records of it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "experiments" / "block_metric", tmp_path / "experiments" / "block_metric")
    records = tmp_path / "results" / "records" / "block_metric" / "bundled"
    records.mkdir(parents=True)
    for path in (ROOT / "results" / "records" / "block_metric" / "bundled").glob("*.json"):
        chosen = json.loads(path.read_text())["configuration"]
        allocator = chosen["allocator"]
        if chosen["sparsity"]["ratio"] == 0.5 and chosen["seed"] < 2 and allocator["metric"] in ("angular", "none"):
            shutil.copy(path, records)
    assert len(list(records.iterdir())) == 4
    return tmp_path


def _records(place: Path) -> list[Path]:
    return sorted((place / "results" / "records" / "block_metric" / "bundled").glob("*.json"))


def _seed(path: Path) -> int:
    return json.loads(path.read_text())["configuration"]["seed"]


def _page(place: Path) -> tuple[str, Page]:
    text = (place / "outputs" / "reports" / "block_metric-bundled.html").read_text(encoding="utf-8")
    return text, Page(text)


def _change(path: Path, **values) -> dict:
    record = json.loads(path.read_text()) | values
    path.write_text(json.dumps(record))
    return record


def test_the_page_shows_state_tables_figures_and_every_run(place, capsys):
    assert report.main(WORDS) == 0
    assert capsys.readouterr().out.splitlines() == [
        "4 of 4 runs have a record",
        "Written: outputs/reports/block_metric-bundled.html",
    ]
    text, page = _page(place)
    assert page.texts["h1"] == ["Block importance metric of the coarse allocation"]
    assert "variant bundled" in text
    assert "4 of 4 runs done</p>" in text
    assert "Not done" not in text
    assert [row for row in page.texts["tr"] if row.startswith("dense")] == ["dense0.0%43.200.861"]
    (figure,) = [found for tag, found in page.elements if tag == "img"]
    assert figure["alt"].endswith("kept width and importance of each block, a panel for each allocator.metric")
    kind, _, data = figure["src"].partition(",")
    assert kind == "data:image/svg+xml;base64"
    assert b"<svg" in base64.b64decode(data)
    for path in _records(place):
        record = json.loads(path.read_text())
        assert record["run_id"] in page.texts["summary"]
        seconds = sum(s["seconds"] for s in record["stages"] if s["name"] in ("calibrate", "plan", "apply"))
        assert f"{seconds:,.2f} (cached)" in text or f">{seconds:,.2f}<" in text
    assert any("round_to: 32" in pre for pre in page.texts["pre"])
    assert any("python: 3" in pre for pre in page.texts["pre"])
    assert "Commits: 125868d78d06. Versions: cfsp 0.1.0" in page.texts["footer"][0]
    assert f"Made by cfsp report {' '.join(WORDS)}." in page.texts["footer"][0]
    sorts = [found for tag, found in page.elements if tag == "th" and "data-first" in found]
    assert len(sorts) == len(re.findall("<th [^>]*><button", text)) == 4 + 2 + 3 + 3


def test_tables_are_those_of_the_markdown_files(place):
    from cfsp.cli import tables as command

    assert report.main(WORDS) == command.main(WORDS) == 0
    markdown = (place / "results" / "tables" / "block_metric" / "bundled" / "main.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in markdown.splitlines() if re.match(r"\| [a-z]+ \| [0-9]", line)]
    assert len(rows) == 3
    for cells in rows:
        html = [re.sub(r"\*\*(.*)\*\*", r"\1 (best)", re.sub("<u>(.*)</u>", r"\1 (second best)", c)) for c in cells]
        assert "".join(html) in _page(place)[1].texts["tr"]


@pytest.mark.parametrize("where", ["outputs/reports/block_metric-bundled.html", "page.html", "a/b & c/page.html"])
def test_links_lead_to_the_records_wherever_the_page_is(place, where):
    assert report.main([*WORDS, f"report={where}"]) == 0
    text = (place / where).read_text(encoding="utf-8")
    links = [found["href"] for tag, found in Page(text).elements if tag == "a" and not found["href"].startswith("#")]
    assert sorted((place / where).parent.joinpath(unquote(link)).resolve() for link in links) == _records(place)
    assert str(place) not in text


def test_nothing_is_fetched_and_only_the_page_s_own_script_may_run(place):
    _change(_records(place)[0], started=HOSTILE)
    assert report.main(WORDS) == 0
    _, page = _page(place)
    sources = [*page.every("src"), *page.every("href"), *page.every("action"), *page.every("srcset")]
    assert sources
    for source in sources:
        assert source.startswith(("#", "data:", "../../results/records/")), source
    (style,), (script,) = page.texts["style"], page.texts["script"]
    assert "url(" not in style + script
    assert "@import" not in style
    (policy,) = [found["content"] for _, found in page.elements if found.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src data:;")
    for content in (style, script):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" in policy
    assert page.every("style") == []
    ids = page.every("id")
    assert len(set(ids)) == len(ids)
    named = [*page.every("aria-labelledby"), *(href[1:] for href in page.every("href") if href.startswith("#"))]
    assert set(named) <= set(ids)


def test_what_records_say_stays_text(place):
    path = _records(place)[0]
    record = json.loads(path.read_text())
    record["configuration"]["logger"] = {"note": HOSTILE}
    record["environment"]["cpu"] = HOSTILE
    record["environment"]["packages"]["torch"] = HOSTILE
    path.write_text(json.dumps(record))
    assert report.main(WORDS) == 0
    text, page = _page(place)
    assert text.count("<script") == 1
    assert [found["src"][:5] for tag, found in page.elements if tag == "img"] == ["data:"]
    assert any(f"note: {HOSTILE}" in pre for pre in page.texts["pre"])


def test_the_same_records_give_the_same_bytes(place, tmp_path_factory, monkeypatch):
    assert report.main(WORDS) == 0
    first = _page(place)[0]
    assert report.main(WORDS) == 0
    assert _page(place)[0] == first
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(place, elsewhere)
    shutil.rmtree(elsewhere / "outputs")
    monkeypatch.chdir(elsewhere)
    assert report.main(WORDS) == 0
    assert _page(elsewhere)[0] == first


def test_what_is_not_done_is_listed_with_its_reason(place, capsys):
    outputs = place / "outputs" / "sweeps" / "block_metric" / "bundled"
    failed, interrupted, *_ = [
        path for path in _records(place) if json.loads(path.read_text())["configuration"]["seed"] == 1
    ]
    for path, error in (
        (failed, {"type": "OutOfMemory", "message": f"no memory;\n {HOSTILE}"}),
        (interrupted, {"type": "Unfinished", "message": "x"}),
    ):
        record = _change(path, status="failed", error=error, stages=[{"name": "plan", "seconds": 1, "cached": False}])
        (outputs / record["run_id"]).mkdir(parents=True)
        path.rename(outputs / record["run_id"] / "record.json")
    (outputs / "damaged").mkdir()
    (outputs / "damaged" / "record.json").write_text("{")
    assert report.main([*WORDS[:-1], "seed=0,1,2"]) == 0
    assert "2 of 6 runs have a record" in capsys.readouterr().out
    text, page = _page(place)
    assert "2 of 6 runs done, 1 failed, 1 interrupted, 2 missing</p>" in text
    assert text.count("<script") == 1
    rows = page.texts["tr"]
    assert any(row.startswith("failed") and f"OutOfMemory: no memory; {HOSTILE}" in row for row in rows)
    assert any(
        row.startswith("interrupted") and "it was killed; the next launch goes on with it" in row for row in rows
    )
    assert "missingallocator.metric=angular seed=2" in rows
    assert len(page.texts["summary"]) == 2


def test_a_damaged_record_is_named_left_out_and_the_exit_code(place, capsys):
    for path in _records(place):
        if _seed(path) == 0:
            path.write_text('{"schema": 1, "run')
    assert report.main(WORDS) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert sum(".json: not a run record" in line and line.endswith("; left out") for line in lines) == 2
    assert "report: warning: blocks: where=" in lines[2]
    assert lines[2].endswith("; left out while runs are missing")
    text, page = _page(place)
    assert "2 of 4 runs done, 2 missing, 2 damaged records left out</p>" in text
    assert "Not made while runs are missing:" in text
    assert "img" not in {tag for tag, _ in page.elements}


def test_many_damaged_records_are_named_in_few_lines(place, capsys):
    for path in _records(place)[:1]:
        for at in range(20):
            path.with_name(f"damaged-{at}.json").write_text("{")
    assert report.main(WORDS) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 6
    assert sum(".json: not a run record" in line for line in lines) == 4
    assert "report: warning: and 16 more of this kind; mend these first" in lines


def test_results_holds_the_page_beside_tables_and_figures(place):
    assert report.main([*WORDS, "results=made"]) == 0
    assert (place / "made" / "reports" / "block_metric" / "bundled.html").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["experiment=block_metrics"], "there is no such experiment; did you mean block_metric"),
        (["variant=bundled"], "experiment is not set"),
        ([*WORDS, "variant=bundle"], "has no such variant"),
        ([*WORDS, "sparsity.ratoi=0.4"], "ratoi"),
        ([*WORDS, "nonsense"], "nonsense: write key=value"),
        ([*WORDS, "paths.records_dir=none"], "no such folder; run the sweep first"),
        ([*WORDS[:-1], "seed=7"], "no record there is of block_metric (bundled); run the sweep first"),
        ([*WORDS, "report=results"], "report=results: cannot be written"),
        ([*WORDS, "report="], "report= is empty: give a file"),
    ],
)
def test_wrong_input_is_one_line(place, capsys, words, said):
    assert report.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("report: ")
    assert said in line
    assert not (place / "outputs").exists()
    assert not [path for path in place.rglob("*") if path.name.startswith(".")]


def test_records_that_do_not_belong_together_are_refused(place, capsys):
    record = json.loads(_records(place)[0].read_text())
    record["measurements"]["pruned"][0]["seq_len"] = 1024
    _records(place)[0].write_text(json.dumps(record))
    assert report.main(WORDS) == 2
    assert "was measured in two ways" in capsys.readouterr().err


def test_numbers_are_written_as_a_script_reads_them():
    assert [_javascript_number(value) for value in (None, float("nan"), float("inf"), -float("inf"), 0.5, 3)] == [
        "", "", "Infinity", "-Infinity", "0.5", "3",
    ]  # fmt: skip


def test_a_sweep_without_a_success_has_a_page_too(place):
    record = json.loads(_records(place)[0].read_text())
    record |= {"status": "failed", "error": {"type": "OutOfMemory", "message": "no memory"}}
    folder = place / "outputs" / "sweeps" / "block_metric" / "bundled" / record["run_id"]
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(record))
    shutil.rmtree(place / "results" / "records")
    assert report.main(WORDS) == 0
    text, _ = _page(place)
    assert "0 of 4 runs done, 1 failed, 3 missing" in text
    assert "OutOfMemory: no memory" in text
