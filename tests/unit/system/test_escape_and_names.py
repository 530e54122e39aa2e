"""Texts of records stay texts in every format; names become folders only where they can."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest

from cfsp.errors import ConfigError
from cfsp.system import escape
from cfsp.system.names import is_name
from cfsp.tables.collection import collect_records
from cfsp.tables.grid import build_table
from cfsp.tables.render import render_csv, render_latex, render_markdown
from tests.helpers.records import ENVIRONMENT, LAYOUT, cell_of, record_of

HOSTILE = "cpu\n\\input{/etc/passwd}\r\\write18{id}\x1b[31m|<script>x</script>[a](javascript:1)`$&\u202e"


def test_one_text_in_every_format():
    assert escape.plain("a\r\n\tb\x1b[0m\u2028c\u202e") == "a b\ufffd[0m c\ufffd"
    assert escape.latex("50%_$\\input{x}\n") == r"50\%\_\$\textbackslash{}input\{x\} "
    assert escape.latex_comment("a\n\\write18{id}") == r"% a \write18{id}"
    assert escape.markdown("a|b\n<i>[l](u)`") == "a&#124;b &lt;i&gt;&#91;l&#93;(u)&#96;"
    assert escape.figure("$\\frac$") == "\\$\\frac\\$"
    assert escape.html("a\x00\n") == "a\ufffd\n"
    assert escape.in_markdown({"a": ["<b>", 1]}) == {"a": ["&lt;b&gt;", 1]}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("=1+1", "'=1+1"), (" =1+1", "' =1+1"), ("@SUM(A1)", "'@SUM(A1)"), ("-x", "'-x"), ("+x", "'+x"),
        ("\t=1", "' =1"), ("\r1", " 1"), ("-1.5", "-1.5"), ("+1e-5", "+1e-5"), ("-inf", "-inf"),
        ("\uff1d1", "'\uff1d1"), ("plain, text", "plain, text"), (1.5, 1.5), ("a\n=b", "a =b"),
    ],
)  # fmt: skip
def test_formulas_are_text_in_a_spreadsheet_and_numbers_stay(text, shown):
    assert escape.cell(text) == shown


def test_texts_of_a_record_are_escaped_in_tables(tmp_path):
    cells = [cell_of(pruner, 0) for pruner in ("cfsp", "flap", "uniform")]
    for cell in cells:
        record = record_of(cell, 50.0, environment={**ENVIRONMENT, "cpu": HOSTILE, "packages": {"torch": HOSTILE}})
        for rows in record.measurements.values():
            rows[1]["task"] = f"=one{HOSTILE}"
        record.write(tmp_path / f"{record.run_id}.json")
    found = [replace(one) for one in collect_records(cells, tmp_path).runs]
    shown = build_table("main", LAYOUT.model_copy(update={"metrics": ["zero_shot/=*"]}), found)
    shown.sections[0][1][1].label = f"@label{HOSTILE}"
    tex, md = render_latex(shown, HOSTILE), render_markdown(shown, HOSTILE)
    for line in tex.splitlines():
        assert line.startswith("%") or "\\input" not in line.replace("\\textbackslash{}input", "")
        assert line.startswith("%") or "\\write" not in line
    assert "<script" not in md
    assert "](" not in md
    pipes = {line.count("|") for line in md.splitlines() if line.startswith("|")}
    assert pipes == {3}
    for text in (tex, md):
        assert "\x1b" not in text
        assert "\u202e" not in text
    rows = list(csv.reader(io.StringIO(render_csv(shown))))
    assert {len(row) for row in rows} == {9}
    assert [cell for row in rows for cell in row if cell[:1] in "=+-@" and cell] == []
    assert any(cell.startswith("'@label") for row in rows for cell in row)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "...", "a/b", "../x", "a b", "a\nb", "\u00e9", "x" * 101, "a\\b", None, 1]
)
def test_invalid_folder_names_are_refused(name):
    assert not is_name(name)


def test_usual_names_are_accepted():
    assert all(map(is_name, ("qwen2.5_7b", "stories260K", "a-b.c_d", "x" * 100)))


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["model.name='../../../escaped'"], "model.name"),
        (["-m", "model.name='../escaped',fine"], "model.name"),
        (["pruner.name=../../evil"], "pruner.name"),
        (["recovery=lora", "recovery.name='a b'"], "recovery.name"),
        (["calibration.name=.."], "calibration.name"),
        (["evaluation.name=a/b"], "evaluation.name"),
        (["model.name=" + "x" * 5000], "model.name"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_name_that_would_leave_the_folder_is_refused_before_a_folder_is_made(
    run_cfsp, tmp_path, monkeypatch, words, key
):
    (tmp_path / "here" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "deep")
    code, _, err = run_cfsp(*words, "paths.output_dir=out", defaults=False)
    assert code == 2
    (line,) = err.splitlines()
    assert f"{key}=" in line
    assert "the name of a folder" in line
    assert len(line) < 500
    assert list(tmp_path.rglob("*")) == [tmp_path / "here", tmp_path / "here" / "deep"]


def test_names_that_are_too_long_together_are_refused():
    from cfsp.config.compose import compose
    from cfsp.config.identity import run_id_of
    from cfsp.config.parse import parse

    config = parse(compose([f"model.name={'x' * 90}"]))
    with pytest.raises(ConfigError, match="model.name=x+: the run's id has 112 characters"):
        run_id_of(config, {})
