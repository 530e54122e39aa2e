"""HTML page of a sweep with its tables, figures and runs. The page needs no network."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cfsp.errors import ConfigError
from cfsp.record.run_record import RunRecord
from cfsp.sweep.experiment import Cell
from cfsp.sweep.request import Request
from cfsp.sweep.state import State
from cfsp.system import escape
from cfsp.system.package import package_path
from cfsp.tables.collection import Collection, RecordedRun
from cfsp.tables.figures import draw_figure
from cfsp.tables.grid import NothingToShowError, build_table
from cfsp.tables.layout import FigureLayout, Layout
from cfsp.tables.metrics import describe_metric
from cfsp.tables.render import commit_text, note_sentences, provenance_sentences, render_plain_cells, source_sentences
from cfsp.tables.run_figures import PRUNING_STAGES, PRUNING_TIME, column_value, pruning_seconds
from cfsp.tables.table import Column, Row, Table

#: The dumper of libyaml is ten times as fast as the one in Python and writes the same text.
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


@dataclass(frozen=True)
class PageCell:
    """Cell of a table of the page.

    Attributes:
        text: text that the cell shows.
        value: sort key; cells with an empty value come last.
        rank: rank of the entry of a table.
    """

    text: str
    value: str
    rank: int = 0


@dataclass(frozen=True)
class Picture:
    """An SVG figure.

    Attributes:
        caption: caption of the figure.
        alt: description for readers who cannot see the figure.
        source: data URI of the file.
    """

    caption: str
    alt: str
    source: str


@dataclass(frozen=True)
class Contents:
    """Tables and figures of a layout.

    Attributes:
        tables: the tables.
        pictures: the figures.
        refused: reasons why tables or figures cannot be made while runs are missing.
    """

    tables: list[Table]
    pictures: list[Picture]
    refused: list[str]


@dataclass(frozen=True)
class RunRow:
    """A row of the table of runs.

    Attributes:
        run_id: id of the run.
        keys: values of the keys that vary.
        figures: figures of all columns of the tables.
        pruning: seconds of the pruning stages.
        total: seconds of all stages.
        commit: commit of the code that executed the run.
        link: path of the record, relative to the page.
        configuration: configuration of the run as YAML.
        environment: environment of the run as YAML.
        stages: name, seconds and peak memory of each stage.
    """

    run_id: str
    keys: list[str]
    figures: list[PageCell]
    pruning: PageCell
    total: PageCell
    commit: str
    link: str
    configuration: str
    environment: str
    stages: list[tuple[str, str, str]]


def build_contents(layout: Layout, collection: Collection, cells: Sequence[Cell]) -> Contents:
    """Build the tables and draw the figures for which there are enough records.

    Args:
        layout: layout of the experiment.
        collection: records of the experiment.
        cells: all runs of the experiment.

    Raises:
        ConfigError: no record is missing, and still a table or figure cannot be made.
    """
    result = Contents([], [], [])
    if not collection.runs:
        return result
    for name, table_layout in layout.tables.items():
        with _collect_refusal(result, collection):
            result.tables.append(build_table(name, table_layout, collection.runs, layout.reported, cells))
    for name, figure_layout in layout.figures.items():
        with _collect_refusal(result, collection):
            result.pictures.extend(_draw_pictures(name, figure_layout, collection.runs))
    return result


@contextmanager
def _collect_refusal(result: Contents, collection: Collection) -> Iterator[None]:
    """Add an error raised inside the context to ``result.refused`` if missing runs can explain it."""
    try:
        yield
    except NothingToShowError as error:
        if collection.missing:
            result.refused.extend(error.problems)
    except ConfigError as error:
        if not collection.missing:
            raise
        result.refused.extend(error.problems)


def render_page(
    request: Request,
    shown: Contents,
    collection: Collection,
    missing: Sequence[tuple[Cell, State]],
    folder: Path,
    overrides: Sequence[str],
) -> bytes:
    """Render the page. The same records give the same bytes.

    Args:
        request: the checked command line.
        shown: tables and figures of the experiment.
        collection: records of the experiment.
        missing: the runs without a record, with the state of each.
        folder: folder of the page, to which its links are relative.
        overrides: the overrides of the command line, for the commands that the page names.
    """
    columns = list({column.metric.label: column for table in shown.tables for column in table.columns}.values())
    columns = [column for column in columns if column != PRUNING_TIME]  # the page always has a column for it
    home = package_path("pkg://cfsp/assets/report")
    script, style = ((home / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    environment = Environment(
        loader=FileSystemLoader(home), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=escape.html,
    )  # fmt: skip
    html = environment.get_template("page.html").render(
        experiment=request.experiment,
        variant=request.variant,
        style=Markup(style),
        script=Markup(script),
        policy=_content_security_policy(script, style),
        done=len(collection.runs),
        requested=len(request.cells),
        missing=[(state, request.named(cell)) for cell, state in missing],
        counts=sorted(Counter(state.name for _, state in missing).items()),
        damaged=collection.damaged,
        tables=[
            (
                table,
                _column_heads(table),
                [(label, _table_rows(table, rows)) for label, rows in table.sections],
                [*note_sentences(table), *source_sentences(table)],
            )
            for table in shown.tables
        ],
        pictures=shown.pictures,
        refused=shown.refused,
        keys=request.varying,
        choices=[_key_values(key, collection.runs) for key in request.varying],
        columns=columns,
        runs=[_build_run_row(run, request.varying, columns, collection.files, folder) for run in collection.runs],
        pruning=", ".join(PRUNING_STAGES),
        provenance=provenance_sentences(list({run.record.run_id: run.record for run in collection.runs}.values()))
        if collection.runs
        else [],
        overrides=shlex.join(overrides),
    )
    return (html + "\n").encode()


def _content_security_policy(script: str, style: str) -> str:
    """Return a content security policy that allows only the page's own script, style and pictures.

    No value from a record can become code.
    """
    script_hash, style_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)
    )
    return (
        f"default-src 'none'; img-src data:; script-src 'sha256-{script_hash}'; style-src 'sha256-{style_hash}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _table_rows(table: Table, rows: Sequence[Row]) -> list[tuple[str, list[PageCell]]]:
    return [(row.label, list(_page_cells(table, row))) for row in rows]


def _page_cells(table: Table, row: Row) -> Iterator[PageCell]:
    texts = iter(render_plain_cells(table, row))
    for at, entry in enumerate(row.entries):
        yield PageCell(next(texts), _javascript_number(entry.mean), entry.rank)
        if table.is_published(at):
            yield PageCell(next(texts), _javascript_number(entry.published.value if entry.published else None))
            yield PageCell(next(texts), _javascript_number(entry.deviation))


def _column_heads(table: Table) -> list[tuple[str, int]]:
    """Return label and direction of every column but the first."""
    heads = []
    for at, column in enumerate(table.columns):
        heads.append((column.metric.label, column.metric.better))
        heads += [("published", 0), ("deviation", 0)] if table.is_published(at) else []
    return heads


def _draw_pictures(name: str, layout: FigureLayout, runs: Sequence[RecordedRun]) -> list[Picture]:
    alt = {
        "curve": f"{layout.metric} against {layout.x}, a line for each {' and '.join(layout.lines)}",
        "pareto": f"{layout.metric} against {layout.x_metric}, a line for each {' and '.join(layout.lines)}",
        "blocks": f"kept width and importance of each block, a panel for each {' and '.join(layout.panels)}",
    }[layout.kind]
    pictures = []
    for file, content in draw_figure(name, layout, runs).items():
        if file.endswith(".svg"):
            part = file.removesuffix(".svg").removeprefix(name).lstrip("-")
            caption = f"{layout.caption} ({part})" if part else layout.caption
            source = f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"
            pictures.append(Picture(caption, f"{caption}: {alt}", source))
    return pictures


def _key_values(key: str, runs: Sequence[RecordedRun]) -> list[str]:
    return list(dict.fromkeys(run.cell.point[key] for run in runs if key in run.cell.point))


def _build_run_row(
    run: RecordedRun, keys: Sequence[str], columns: Sequence[Column], files: dict[str, Path], folder: Path
) -> RunRow:
    record = run.record
    values = [(column, column_value(record, column)) for column in columns]
    return RunRow(
        record.run_id,
        [run.cell.point.get(key, "") for key in keys],
        [
            PageCell("" if value is None else column.metric.format_value(value), _javascript_number(value))
            for column, value in values
        ],
        _pruning_seconds_cell(record),
        _stage_seconds_cell(record.stages),
        commit_text(record.environment["git"]),
        quote(Path(os.path.relpath(files[record.run_id], folder)).as_posix()),
        _dump_yaml(record.configuration),
        _json_as_yaml(json.dumps(record.environment)),
        _stage_rows(record),
    )


def _pruning_seconds_cell(record: RunRecord) -> PageCell:
    """Return the seconds of pruning with empty caches, or the measured seconds if the record does not state them."""
    seconds = pruning_seconds(record)
    if seconds is None:
        return _stage_seconds_cell([stage for stage in record.stages if stage["name"] in PRUNING_STAGES])
    return PageCell(f"{seconds:,.2f}", _javascript_number(seconds))


def _stage_seconds_cell(stages: Sequence[dict[str, Any]]) -> PageCell:
    """Return the total seconds of the stages, with a remark if a stage was read from the cache."""
    if not stages:
        return PageCell("", "")
    total = sum(stage["seconds"] for stage in stages)
    cached = any(stage["cached"] for stage in stages)
    return PageCell(f"{total:,.2f}{' (cached)' if cached else ''}", _javascript_number(total))


def _stage_rows(record: RunRecord) -> list[tuple[str, str, str]]:
    """Return name, seconds and peak memory of each stage. The memory is that of the GPUs if there are any."""
    size = describe_metric("cost", "checkpoint", "bytes").format_value
    rows = []
    for stage in record.stages:
        peak = stage.get("peak_gpu_bytes") or stage.get("peak_bytes")
        cached = " (cached)" if stage["cached"] else ""
        rows.append((stage["name"], f"{stage['seconds']:,.2f}{cached}", size(peak) if peak else ""))
    return rows


def _javascript_number(value: float | None) -> str:
    """Format a number for JavaScript; None and NaN become an empty string."""
    if value is None or math.isnan(value):
        return ""
    return repr(value) if math.isfinite(value) else "-Infinity" if value < 0 else "Infinity"


@lru_cache(maxsize=64)
def _json_as_yaml(content: str) -> str:
    """Convert JSON to YAML. The cache serves the runs that share the same content."""
    return _dump_yaml(json.loads(content))


def _dump_yaml(values: Any) -> str:
    return yaml.dump(values, Dumper=_DUMPER, sort_keys=False, allow_unicode=True, width=100).rstrip()
