"""Tables from records: what is found, shown, marked, and refused. The records here are made up, their form is not."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import replace

import pytest

from cfsp.cli import tables as command
from cfsp.config.compose import compose
from cfsp.config.identity import METHOD_VERSION
from cfsp.config.parse import parse
from cfsp.errors import ConfigError
from cfsp.pipeline.preflight import prepare
from cfsp.record.run_record import RunRecord
from cfsp.sweep import composer
from cfsp.sweep.experiment import Cell
from cfsp.tables import collection
from cfsp.tables.collection import RecordedRun, collect_records
from cfsp.tables.figures import draw_figure
from cfsp.tables.grid import build_table
from cfsp.tables.layout import FigureLayout, GapOf, TableLayout
from cfsp.tables.render import render_csv, render_latex, render_markdown
from cfsp.tables.reported import load_reported
from cfsp.tables.run_figures import PEAK_MEMORY, column_value, pruning_seconds
from tests.conftest import ROOT
from tests.helpers.records import LAYOUT, cell_of, record_of, row_of


@pytest.fixture
def folder(tmp_path):
    """Three pruners, two seeds; named otherwise than by their ids."""
    cells = [cell_of(pruner, seed) for pruner in ("cfsp", "flap", "uniform") for seed in (0, 1)]
    for at, (cell, perplexity) in enumerate(zip(cells, (50.0, 51.0, 55.0, 57.0, 90.0, 91.0), strict=True)):
        record_of(cell, perplexity, acc=0.6 - at / 100).write(tmp_path / f"{9 - at}.json")
    return tmp_path, cells


def test_records_are_found_by_what_they_decide_not_by_name_or_place(folder):
    path, cells = folder
    elsewhere = RunRecord.read(path / "9.json")
    assert elsewhere is not None
    elsewhere.configuration["paths"]["cache_dir"] = "/other"
    elsewhere.configuration["model"]["path"] = "/a/copy/of/the/model"
    elsewhere.identity |= {**prepare(parse(compose(cells[0].overrides))).identity, "dtype": "another machine's"}
    elsewhere.configuration["logger"] = {}
    elsewhere.configuration["evaluation"]["perplexity"]["texts"]["another"] = {"path": "that was not measured"}
    elsewhere.write(path / "9.json")
    found = collect_records([*cells, cell_of("cfsp", 7)], path)
    assert [one.cell for one in found.runs] == cells
    assert found.missing == [cell_of("cfsp", 7)]


def test_markdown_shows_means_spreads_marks_and_where_it_all_comes_from(folder):
    path, cells = folder
    text = render_markdown(build_table("main", LAYOUT, collect_records(cells, path).runs), "cfsp tables experiment=x")
    lines = text.splitlines()
    assert "| pruner | removed | perplexity, bundled ↓ | mean acc ↑ |" in lines
    assert "| dense | 0.0% | 40.00 | 0.800 |" in lines
    assert "| cfsp | 50.0% | **50.50 ± 0.71** | **0.695 ± 0.007** |" in lines
    assert "| flap | 50.0% | <u>56.00 ± 1.41</u> | <u>0.675 ± 0.007</u> |" in lines
    assert "| uniform | 50.0% | 90.50 ± 0.71 | 0.655 ± 0.007 |" in lines
    assert "6 records, seeds 0, 1." in text
    assert "Commits: 0123456789ab. Versions: cfsp 0.1.0, torch 2.13.0" in text
    assert "Made by: cfsp tables experiment=x" in text
    assert all(f"`{'-'.join(cell.point.values())}`" in text for cell in cells)


@pytest.mark.parametrize(("label", "shown"), [("[a]", "{}[a]"), ("*", "{}*"), ("cfsp *", "cfsp *")])
def test_a_label_of_a_latex_row_is_no_argument_of_the_line_break_before_it(label, shown):
    from cfsp.tables.render import _render_latex_label

    assert _render_latex_label(label) == shown


def test_latex_is_escaped_and_balanced(folder):
    path, cells = folder
    text = render_latex(build_table("main", LAYOUT, collect_records(cells, path).runs), "c")
    assert r"\caption{A caption with 50 \% \& more}" in text
    assert r"cfsp & 50.0\% & \textbf{50.50 $\pm$ 0.71} & \textbf{0.695 $\pm$ 0.007} \\" in text
    assert r"flap & 50.0\% & \underline{56.00 $\pm$ 1.41}" in text
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        assert text.count(rule) == 1
    assert len(re.findall(r"\\begin", text)) == len(re.findall(r"\\end", text)) == 2
    body = [line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {line.count(" & ") for line in body} == {3}


def test_what_limits_a_figure_stands_at_it_in_every_form(folder):
    path, cells = folder
    records = collect_records(cells, path).runs
    for one in records:
        if one.cell.point["pruner"] == "flap":
            for row in one.record.measurements["pruned"]:
                row["detail"] = {**(row.get("detail") or {}), "lacks_bos": row["suite"] == "perplexity", "truncated": 2}
    marked = build_table("main", LAYOUT, records)
    text, source = render_markdown(marked, "c"), render_latex(marked, "c")
    assert "| flap | 50.0% | <u>56.00 ± 1.41</u>†‡ | <u>0.675 ± 0.007</u>‡ |" in text.splitlines()
    assert "† windows lack the BOS that the tokenizer adds by itself.  " in text.splitlines()
    assert r"\textsuperscript{\textdagger{}}" in source
    assert r"\par\footnotesize \textdaggerdbl{} requests longer than the model's positions were cut" in source
    rows = list(csv.DictReader(io.StringIO(render_csv(marked))))
    assert {row["notes"] for row in rows if row["pruner"] == "cfsp"} == {""}
    assert "†" not in render_markdown(build_table("main", LAYOUT, collect_records(cells, path).runs), "c")


def test_csv_is_unrounded(folder):
    path, cells = folder
    rows = list(csv.DictReader(io.StringIO(render_csv(build_table("main", LAYOUT, collect_records(cells, path).runs)))))
    (row,) = [row for row in rows if row["pruner"] == "flap" and row["metric"] == "perplexity, bundled"]
    assert float(row["mean"]) == 56.0
    assert float(row["std"]) == pytest.approx(2**0.5)
    assert (row["seeds"], row["better"], row["section"]) == ("2", "lower", "sparsity.ratio 0.5")
    assert row["records"] == "flap-0.5-0 flap-0.5-1"


def test_a_seed_that_is_missing_is_said_and_a_figure_that_is_missing_is_empty(folder):
    path, cells = folder
    record = RunRecord.read(path / "9.json")
    assert record is not None
    record.measurements["pruned"] = record.measurements["pruned"][1:]
    record.write(path / "9.json")
    (path / "7.json").unlink()
    text = render_markdown(build_table("main", LAYOUT, collect_records(cells, path).runs), "c")
    assert "| cfsp | 50.0% | 51.00 (1 of 2 seeds) |" in text
    record.measurements["pruned"] = []
    text = render_markdown(build_table("main", LAYOUT, [*collect_records(cells[1:], path).runs]), "c")
    assert "| flap | 50.0% (1 of 2 seeds) | 57.00 (1 of 2 seeds) |" in text


def test_what_looks_alike_is_marked_alike(folder):
    path, cells = folder
    for name in ("7.json", "6.json"):
        record = RunRecord.read(path / name)
        assert record is not None
        record.measurements["pruned"][0]["value"] = 50.5
        record.write(path / name)
    text = render_markdown(build_table("main", LAYOUT, collect_records(cells, path).runs), "c")
    assert "**50.50 ± 0.71**" in text
    assert "**50.50 ± 0.00**" in text
    assert "<u>90.50 ± 0.71</u>" in text


def _refuses(records, match: str, layout: TableLayout = LAYOUT) -> None:
    with pytest.raises(ConfigError, match=match):
        build_table("main", layout, [RecordedRun(cell, record) for cell, record in records])


def test_what_does_not_belong_into_one_table_is_refused():
    a, b = cell_of("cfsp", 0), cell_of("flap", 0)
    good = record_of(a, 50)
    other = record_of(b, 50)
    other.measurements["pruned"][0]["seq_len"] = 1024
    _refuses([(a, good), (b, other)], r"measured in two ways \(seq_len: 256 and 1024; cfsp-0.5-0 and flap-0.5-0\)")
    other = record_of(b, 50)
    other.measurements["pruned"][1]["version"] = "2.0"
    _refuses([(a, good), (b, other)], "zero_shot/one/acc was measured in two ways .version: None and 2.0")
    _refuses([(a, good), (b, record_of(b, 50, model={"fingerprint": "2", "dtype": "float32"}))], "more than one model")
    _refuses(
        [(a, good), (b, record_of(b, 50, model={"fingerprint": "sha256:1", "dtype": "bf16"}))], "more than one dtype"
    )
    _refuses([(a, good), (b, record_of(b, 50, dense=41))], "the dense figures for perplexity, bundled differ")
    bare = record_of(a, 50)
    del bare.measurements["dense"]
    _refuses([(a, bare)], "no record has dense figures")
    wrong = LAYOUT.model_copy(update={"metrics": ["zero_shot/three/acc"]})
    _refuses([(a, good)], "zero_shot/three/acc: no record has such a figure; there are perplexity/bundled", wrong)
    c = cell_of("cfsp", 0, **{"sparsity.round_to": "64"})
    _refuses([(a, good), (c, record_of(c, 50))], "runs that differ in sparsity.round_to would stand in one place")


def test_what_follows_from_the_model_may_differ_between_models():
    """Another tokenizer makes other numbers of tokens of one text; the window is the table's choice."""
    layout = LAYOUT.model_copy(update={"groups": ["model"]})
    found = []
    for name, tokens, window in (("llama2_7b", 100, 4096), ("qwen3_8b", 90, 40960)):
        cell = cell_of("cfsp", 0, model=name)
        record = record_of(cell, 50, model={"fingerprint": name, "dtype": "float32"})
        for rows in record.measurements.values():
            rows[0]["n"] = tokens
            rows[1]["seq_len"] = rows[2]["seq_len"] = window
        found.append(RecordedRun(cell, record))
    assert [label for label, _ in build_table("main", layout, found).sections] == ["model llama2_7b", "model qwen3_8b"]
    found[1].record.measurements["pruned"][0]["n"] = 91
    with pytest.raises(ConfigError, match="measured in two ways .n: 90 and 91"):
        build_table("main", layout, found)
    for rows in found[1].record.measurements.values():
        rows[0] |= {"n": 90, "seq_len": 2048}
    with pytest.raises(ConfigError, match="measured in two ways .seq_len: 256 and 2048"):
        build_table("main", layout, found)


def test_alternatives_of_a_metric_and_two_rows_of_one_configuration(folder):
    path, cells = folder
    both = LAYOUT.model_copy(update={"metrics": ["zero_shot/none/acc | zero_shot/t*/acc"], "rows": ["arm"]})
    same = [Cell(cells[0].overrides, {**cells[0].point, "arm": arm}) for arm in ("a", "b")]
    made = build_table("main", both, collect_records(same, path).runs)
    assert [column.metric.label for column in made.columns] == ["two, acc"]
    assert [row.label for row in made.sections[0][1]] == ["dense", "a", "b"]
    assert len(made.records) == 1


def test_two_records_of_one_run_and_other_versions_are_refused(folder):
    path, cells = folder
    record = RunRecord.read(path / "9.json")
    assert record is not None
    record.run_id = "the-same-in-bfloat16"
    record.write(path / "twice.json")
    with pytest.raises(ConfigError, match="several records in .* are of this run .cfsp-0.5-0, the-same-in-bfloat16"):
        collect_records(cells, path)
    values = json.loads((path / "twice.json").read_text()) | {"schema": 99}
    (path / "twice.json").write_text(json.dumps(values))
    collection = collect_records(cells, path)  # one foreign record among many does not cost the tables of the others
    (line,) = collection.damaged
    assert "twice.json: not a run record (schema 99, this version reads 2)" in line
    assert len(collection.runs) == len(cells)
    (path / "twice.json").unlink()
    record.identity["version"] = METHOD_VERSION - 1
    record.write(path / "9.json")
    with pytest.raises(ConfigError, match="of other versions of the methods"):
        collect_records(cells, path)


def test_the_command_writes_names_what_is_damaged_and_repeats_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    experiment = tmp_path / "experiments" / "temperature"
    experiment.mkdir(parents=True)
    (experiment / "tables.yaml").write_text(
        "tables: {main: {caption: c, groups: [sparsity.ratio], rows: [allocator.temperature], "
        "metrics: [perplexity/*]}}\n"
        "figures: {curve: {kind: curve, caption: c, x: sparsity.ratio, lines: [allocator.temperature], "
        "metric: perplexity/*}}\n"
    )
    words = ["experiment=temperature", "seed=0,1", "allocator.temperature=0,1"]
    assert command.main(words) == 2
    assert "no such folder; run the sweep first" in capsys.readouterr().err
    records = tmp_path / "results" / "records" / "temperature" / "bundled"
    records.mkdir(parents=True)
    assert command.main(words) == 2
    assert "no record there is of temperature (bundled)" in capsys.readouterr().err
    for at, cell in enumerate(command.read_request(words).cells[:-1]):
        record_of(cell, 50.0 + at).write(records / f"{at}.json")
    assert command.main(words) == 0
    assert "1 of 8 runs have no record" in capsys.readouterr().out
    (records / "broken.json").write_text('{"schema": 1, "run')
    made = [path for kind in ("tables", "figures") for path in (tmp_path / "results" / kind).rglob("*.*")]
    assert sorted(path.suffix for path in made) == [".csv", ".md", ".png", ".svg", ".tex"]
    before = [path.read_bytes() for path in made]
    assert command.main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "broken.json: not a run record" in line
    assert [path.read_bytes() for path in made] == before


@pytest.mark.parametrize("kind", ["curve", "pareto", "blocks"])
def test_figures_are_the_same_bytes_again(folder, kind):
    path, cells = folder
    found = collect_records(cells, path).runs
    for one in found:
        one.record.blocks = [{"width": 10, "base_width": 20, "distance": {"angular": 0.1}}] * 3
    layout = FigureLayout(
        kind=kind, caption="c", x="sparsity.ratio", x_metric="zero_shot/one/acc", metric="perplexity/*",
        lines=["pruner"], panels=["pruner"],
    )  # fmt: skip
    first, second = draw_figure("f", layout, found), draw_figure("f", layout, found)
    assert first == second
    assert first["f.png"].startswith(b"\x89PNG")
    assert b"<dc:date>" not in first["f.svg"]
    each = draw_figure("f", layout.model_copy(update={"each": ["pruner"]}), found)
    assert {file for file in each if file.endswith("svg")} == {"f-cfsp.svg", "f-flap.svg", "f-uniform.svg"}
    if kind != "pareto":
        with pytest.raises(ConfigError, match="runs that differ in pruner would stand in one place"):
            draw_figure("f", layout.model_copy(update={"lines": [], "panels": []}), found)
    with pytest.raises(ConfigError, match="no record of the experiment is there"):
        draw_figure("f", layout.model_copy(update={"where": {"pruner": "shortgpt"}}), found)
    if kind != "blocks":
        with pytest.raises(ConfigError, match="metric is not set"):
            draw_figure("f", layout.model_copy(update={"metric": None}), found)


REPORTED = """\
model,pruner,sparsity.ratio,sparsity.scope,metric,seq_len,value,source
bundled,dense,,,perplexity/bundled/perplexity,256,41,Paper A
bundled,cfsp,0.50,ffn,perplexity/bundled/perplexity,256,51.00,Paper A
bundled,flap,0.5,decoder,perplexity/bundled/perplexity,256,1,another scope
bundled,uniform,0.5,ffn,perplexity/bundled/perplexity,128,2,another window
other,uniform,0.5,ffn,perplexity/bundled/perplexity,256,3,another model
bundled,flap,0.5,ffn,zero_shot/one/acc | zero_shot/two/acc,,0.6,Paper B
"""


def test_a_published_figure_stands_beside_ours_only_where_it_was_measured_in_the_same_way(folder, tmp_path_factory):
    path, cells = folder
    file = tmp_path_factory.mktemp("reported") / "reported.csv"
    file.write_text(REPORTED, encoding="utf-8")
    made = build_table("main", LAYOUT, collect_records(cells, path).runs, load_reported(file))
    lines = render_markdown(made, "c").splitlines()
    head = "| pruner | removed | perplexity, bundled ↓ | published | deviation | mean acc ↑ | published | deviation |"
    assert head in lines
    assert "| dense | 0.0% | 40.00 | 41.00 [1] | -1.00 | 0.800 |  |  |" in lines
    assert "| cfsp | 50.0% | **50.50 ± 0.71** | 51.00 [1] | -0.50 | **0.695 ± 0.007** |  |  |" in lines
    assert "| flap | 50.0% | <u>56.00 ± 1.41</u> |  |  | <u>0.675 ± 0.007</u> | 0.600 [2] | +7.50 pp |" in lines
    assert "| uniform | 50.0% | 90.50 ± 0.71 |  |  | 0.655 ± 0.007 |  |  |" in lines
    assert "Published: [1] Paper A; [2] Paper B. Deviation: ours less the published one.  " in lines
    rows = [line for line in render_latex(made, "c").splitlines() if line.startswith(("cfsp &", "pruner &"))]
    assert {row.count(" & ") for row in rows} == {7}
    (cfsp,) = [
        row
        for row in csv.DictReader(io.StringIO(render_csv(made)))
        if row["pruner"] == "cfsp" and row["metric"].startswith("perplexity")
    ]
    assert (cfsp["published"], cfsp["deviation"], cfsp["source"]) == ("51.0", "-0.5", "Paper A")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model,metric,seq_len,value\n", "the column source is missing"),
        (REPORTED.replace("51.00", "fifty"), "line 3: could not convert string to float: 'fifty'; value and seq_len"),
        (REPORTED.replace("51.00,Paper A", "51.00,"), "line 3: no source"),
    ],
)
def test_published_figures_that_cannot_be_used_are_refused(tmp_path, text, message):
    (tmp_path / "reported.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_reported(tmp_path / "reported.csv")


def test_two_published_figures_for_one_cell_are_refused(folder, tmp_path_factory):
    path, cells = folder
    file = tmp_path_factory.mktemp("reported") / "reported.csv"
    file.write_text(REPORTED + REPORTED.splitlines()[2].replace("Paper A", "Paper C") + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"several figures for perplexity/bundled/perplexity .*\(Paper A; Paper C\)"):
        build_table("main", LAYOUT, collect_records(cells, path).runs, load_reported(file))


def test_a_table_may_be_about_some_of_the_runs(folder):
    path, cells = folder
    found = collect_records(cells, path).runs
    made = build_table("main", LAYOUT.model_copy(update={"where": {"pruner": "flap"}}), found)
    assert [row.label for row in made.rows] == ["dense", "flap"]
    with pytest.raises(ConfigError, match=r"where=\{'pruner': 'none'\}: no record"):
        build_table("main", LAYOUT.model_copy(update={"where": {"pruner": "none"}}), found)


def _stage(name: str, seconds: float, cached: bool = False, **more: float | None) -> dict[str, object]:
    return {"name": name, "seconds": seconds, "cached": cached, **more}


def test_pruning_time_counts_what_the_cache_saved_and_is_empty_where_that_is_not_known():
    def time_of(*stages: dict[str, object]) -> float | None:
        return pruning_seconds(record_of(cell_of("cfsp", 0), 50.0, stages=list(stages)))

    rest = (_stage("plan", 2.0, saved_seconds=0.0), _stage("apply", 0.5), _stage("evaluate pruned", 100.0))
    assert time_of(_stage("calibrate", 1.0, saved_seconds=0.0), *rest) == 3.5
    assert time_of(_stage("calibrate", 1.0, True, saved_seconds=20.0), *rest) == 23.5
    assert time_of(_stage("calibrate", 1.0, True, saved_seconds=None), *rest) is None
    assert time_of(_stage("calibrate", 1.0, True), *rest) is None, "a record from before the cost was kept"


def test_the_gap_is_the_log_of_the_perplexity_less_that_of_the_dense_model(folder):
    path, cells = folder
    layout = LAYOUT.model_copy(update={"metrics": [GapOf(gap="perplexity/*")]})
    made = build_table("main", layout, collect_records(cells, path).runs)
    (column,) = made.columns
    assert (column.metric.label, column.metric.unit) == ("gap, perplexity, bundled", "nats per token")
    dense, *others = made.rows
    assert dense.entries[0].values == {0: 0.0}
    for row in others:
        whole = next(
            r for r in build_table("main", LAYOUT, collect_records(cells, path).runs).rows if r.label == row.label
        )
        at = [c.metric.label for c in build_table("main", LAYOUT, collect_records(cells, path).runs).columns]
        perplexity = whole.entries[at.index("perplexity, bundled")].values
        assert row.entries[0].values == {s: pytest.approx(math.log(v / 40.0)) for s, v in perplexity.items()}


def test_peak_memory_is_that_of_the_stages_that_prune():
    def peak_of(*stages: dict[str, object]) -> float | None:
        return column_value(record_of(cell_of("cfsp", 0), 50.0, stages=list(stages)), PEAK_MEMORY)

    stages = [_stage("calibrate", 1.0, peak_bytes=5), _stage("plan", 1.0, peak_bytes=9)]
    assert peak_of(*stages, _stage("evaluate pruned", 1.0, peak_bytes=50)) == 9
    assert peak_of(_stage("calibrate", 1.0, peak_bytes=5, peak_gpu_bytes=70), stages[1]) == 70
    assert peak_of(_stage("calibrate", 1.0, peak_bytes=None), stages[1]) is None


def test_a_record_of_another_text_or_model_is_not_taken(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} text of words " * 200, encoding="utf-8")
    (tmp_path / "c.txt").write_text((tmp_path / "a.txt").read_text(), encoding="utf-8")
    small = {"calibration.n_samples": "2", "calibration.seq_len": "16", "evaluation": "none", "calibration": "text"}
    a, b, c, gone = (
        cell_of("cfsp", 0, **small, **{"calibration.path": str(tmp_path / f"{name}.txt")})
        for name in ("a", "b", "c", "gone")
    )
    record_of(a, 50.0, identity=prepare(parse(compose(a.overrides))).identity).write(tmp_path / "records" / "a.json")
    found = collect_records([a, b, c, gone], tmp_path / "records")
    assert [one.cell for one in found.runs] == [a, c], "the same file, and one with the same content"
    assert found.missing == [b, gone]


def test_no_published_figure_beside_a_run_that_the_command_line_changed(folder, tmp_path_factory):
    path, cells = folder
    file = tmp_path_factory.mktemp("reported") / "reported.csv"
    file.write_text(REPORTED, encoding="utf-8")
    found = [replace(one, as_shipped=False) for one in collect_records(cells, path).runs]
    assert build_table("main", LAYOUT, found, load_reported(file)).sources == []


def test_what_is_missing_has_an_empty_row_and_competes_with_nobody(folder):
    path, cells = folder
    found = [one for one in collect_records(cells, path).runs if one.cell not in (cells[0], cells[1], cells[2])]
    text = render_markdown(build_table("main", LAYOUT, found, (), cells), "c")
    lines = text.splitlines()
    assert lines.index("| cfsp |  |  |  |") < lines.index("| flap | 50.0% (1 of 2 seeds) | 57.00 (1 of 2 seeds) | "
                                                           "0.670 (1 of 2 seeds) |")  # fmt: skip
    assert "| uniform | 50.0% | **90.50 ± 0.71** | **0.655 ± 0.007** |" in lines
    assert "3 of 6 runs have a record; cells of the others are empty" in text


def test_times_of_two_machines_are_not_mixed():
    found = []
    for seed, device in ((0, "cpu"), (1, "cuda")):
        cell = cell_of("cfsp", seed)
        record = record_of(cell, 50)
        for rows in record.measurements.values():
            rows.append(row_of("cost", "prefill", "tokens_per_second", 10.0, detail={"device": device, "threads": 2}))
        found.append(RecordedRun(cell, record))
    with pytest.raises(
        ConfigError, match="cost/prefill/tokens_per_second was measured in two ways .device: cpu and cu"
    ):
        build_table("main", LAYOUT.model_copy(update={"metrics": ["cost/*"]}), found)


DAMAGES = [
    ("configuration", None), ("configuration", {}), ("identity", {}), ("environment", {}), ("model", {}),
    ("measurements", None), ("measurements", {"dense": None}), ("stages", None), ("plan", {}),
    ("measurements", {"dense": [{"suite": "a", "task": "b", "metric": "c"}]}),
    ("measurements", {"dense": [{"suite": "a", "task": "b", "metric": "c", "value": float("nan")}]}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), DAMAGES, ids=lambda value: str(value)[:30])
def test_a_record_that_lacks_something_is_damaged(folder, name, value):
    path, cells = folder
    values = json.loads((path / "9.json").read_text()) | {name: value}
    (path / "9.json").write_text(json.dumps(values))
    collection = collect_records(cells, path)
    (line,) = collection.damaged
    assert "9.json: not a whole run record (" in line
    assert collection.missing == [cells[0]]


def test_a_record_of_nothing_is_damaged_too(folder):
    path, cells = folder
    (path / "9.json").write_text("{}")
    assert len(collect_records(cells, path).damaged) == 1


@pytest.mark.parametrize("results", ["", "/dev/null", "/proc/x"])
def test_a_folder_that_cannot_be_written_is_one_line(monkeypatch, capsys, results):
    monkeypatch.chdir(ROOT)
    assert command.main(["experiment=block_metric", f"results={results}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tables: results={results}")


def test_a_choice_among_the_runs_gives_the_tables_that_it_has(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    assert command.main(["experiment=block_metric", "sparsity.ratio=0.2", f"results={tmp_path}"]) == 0
    said = capsys.readouterr()
    assert "tables: blocks: where=" in said.err
    assert "have no record" not in said.out
    assert [path.name for path in tmp_path.rglob("*.md")] == ["main.md"]
    assert command.main(["experiment=block_metric", "sparsity.ratio=0.50", f"results={tmp_path}"]) == 0
    assert list(tmp_path.rglob("*.png"))


def test_many_runs_cost_one_composition_for_each_choice_of_groups(tmp_path, monkeypatch):
    """The time of tables and reports lies in Hydra and in the separation of settings, so both are counted."""
    at = {"paths.output_dir": "out"}  # the default names other keys, which Hydra resolves for each command line
    cells = [cell_of(pruner, seed, **at) for pruner in ("cfsp", "flap") for seed in range(20)]
    records = {pruner: record_of(cell_of(pruner, 0, **at), 50.0) for pruner in ("cfsp", "flap")}
    for cell in cells:
        record = records[cell.point["pruner"]]
        made = replace(record, run_id=str(cell).replace(" ", "_").replace("=", "-"))
        made.configuration = {**record.configuration, "seed": int(cell.point["seed"])}
        made.write(tmp_path / f"{made.run_id}.json")
    composed, separated = [], []
    compose_once, separate_once = composer.compose, collection.configuration_parts
    monkeypatch.setattr(composer, "compose", lambda words: composed.append(words) or compose_once(words))
    monkeypatch.setattr(collection, "configuration_parts", lambda values: separated.append(1) or separate_once(values))
    gathered = collect_records(cells, tmp_path)
    assert len(gathered.runs) == 40
    assert len(composed) == 2
    assert len(separated) == 2 * 40
    assert set(gathered.keys) == {run.record.run_id for run in gathered.runs}
