"""A sweep as one HTML page with its tables, figures and runs. The page needs no network."""

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
from cfsp.tables.figures import draw
from cfsp.tables.grid import NothingToShowError, table
from cfsp.tables.layout import FigureLayout, Layout
from cfsp.tables.metrics import describe
from cfsp.tables.render import commit_of, notes, plain_cells, provenance, sources
from cfsp.tables.run_figures import PRUNING, PRUNING_TIME, pruning_seconds, value_of
from cfsp.tables.table import Column, Row, Table

#: libyaml's dumper writes the same text ten times as fast.
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


@dataclass(frozen=True)
class Shown:
    """A cell.

    Attributes:
        text: what is shown.
        value: what it is sorted by; an empty value comes last.
        rank: rank of a table's entry.
    """

    text: str
    value: str
    rank: int = 0


@dataclass(frozen=True)
class Picture:
    """An SVG figure.

    Attributes:
        caption: what it shows.
        alt: what is drawn, for readers who cannot see it.
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
        refused: why a table or figure cannot be made while runs are missing.
    """

    tables: list[Table]
    pictures: list[Picture]
    refused: list[str]


@dataclass(frozen=True)
class Run:
    """A row of the table of runs.

    Attributes:
        run_id: id of the run.
        keys: values of the keys that vary.
        figures: figures of all columns of the tables.
        pruning: seconds of the stages that prune.
        total: seconds of all stages.
        commit: commit that the run was made with.
        link: path of its record, seen from the page.
        configuration: its configuration as YAML.
        environment: its environment as YAML.
        stages: name, seconds and peak memory of each stage.
    """

    run_id: str
    keys: list[str]
    figures: list[Shown]
    pruning: Shown
    total: Shown
    commit: str
    link: str
    configuration: str
    environment: str
    stages: list[tuple[str, str, str]]


def contents(layout: Layout, collection: Collection, cells: Sequence[Cell]) -> Contents:
    """Make the tables and figures that the records suffice for.

    Args:
        layout: layout of the experiment.
        collection: its records.
        cells: all runs of the experiment.

    Raises:
        ConfigError: a table or figure cannot be made although no record is missing.
    """
    result = Contents([], [], [])
    if not collection.runs:
        return result
    for name, table_layout in layout.tables.items():
        with _refusal(result, collection):
            result.tables.append(table(name, table_layout, collection.runs, layout.reported, cells))
    for name, figure_layout in layout.figures.items():
        with _refusal(result, collection):
            result.pictures.extend(_pictures(name, figure_layout, collection.runs))
    return result


@contextmanager
def _refusal(result: Contents, collection: Collection) -> Iterator[None]:
    """Add the reason why a table or figure cannot be made to the result, where missing runs explain it."""
    try:
        yield
    except NothingToShowError as error:
        if collection.missing:
            result.refused.extend(error.problems)
    except ConfigError as error:
        if not collection.missing:
            raise
        result.refused.extend(error.problems)


def page(
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
        folder: the folder that the page will be in, from which its links lead.
        overrides: the overrides of the command line, for the commands that the page names.
    """
    columns = list({column.metric.label: column for table in shown.tables for column in table.columns}.values())
    columns = [column for column in columns if column != PRUNING_TIME]  # the page has a column for it already
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
        policy=_policy(script, style),
        done=len(collection.runs),
        requested=len(request.cells),
        missing=[(state, request.named(cell)) for cell, state in missing],
        counts=sorted(Counter(state.name for _, state in missing).items()),
        damaged=collection.damaged,
        tables=[
            (
                table,
                _heads(table),
                [(label, _rows(table, rows)) for label, rows in table.sections],
                [*notes(table), *sources(table)],
            )
            for table in shown.tables
        ],
        pictures=shown.pictures,
        refused=shown.refused,
        keys=request.varying,
        choices=[_choices(key, collection.runs) for key in request.varying],
        columns=columns,
        runs=[_run(run, request.varying, columns, collection.files, folder) for run in collection.runs],
        pruning=", ".join(PRUNING),
        provenance=provenance(list({run.record.run_id: run.record for run in collection.runs}.values()))
        if collection.runs
        else [],
        overrides=shlex.join(overrides),
    )
    return (html + "\n").encode()


def _policy(script: str, style: str) -> str:
    """Return the content security policy: only the page's own script, style and pictures. No value can become code."""
    script_hash, style_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)
    )
    return (
        f"default-src 'none'; img-src data:; script-src 'sha256-{script_hash}'; style-src 'sha256-{style_hash}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _rows(table: Table, rows: Sequence[Row]) -> list[tuple[str, list[Shown]]]:
    return [(row.label, list(_cells(table, row))) for row in rows]


def _cells(table: Table, row: Row) -> Iterator[Shown]:
    texts = iter(plain_cells(table, row))
    for at, entry in enumerate(row.entries):
        yield Shown(next(texts), _number(entry.mean), entry.rank)
        if table.is_published(at):
            yield Shown(next(texts), _number(entry.published.value if entry.published else None))
            yield Shown(next(texts), _number(entry.deviation))


def _heads(table: Table) -> list[tuple[str, int]]:
    """Return label and direction of every column but the first."""
    heads = []
    for at, column in enumerate(table.columns):
        heads.append((column.metric.label, column.metric.better))
        heads += [("published", 0), ("deviation", 0)] if table.is_published(at) else []
    return heads


def _pictures(name: str, layout: FigureLayout, runs: Sequence[RecordedRun]) -> list[Picture]:
    alt = {
        "curve": f"{layout.metric} against {layout.x}, a line for each {' and '.join(layout.lines)}",
        "pareto": f"{layout.metric} against {layout.x_metric}, a line for each {' and '.join(layout.lines)}",
        "blocks": f"kept width and importance of each block, a panel for each {' and '.join(layout.panels)}",
    }[layout.kind]
    pictures = []
    for file, content in draw(name, layout, runs).items():
        if file.endswith(".svg"):
            part = file.removesuffix(".svg").removeprefix(name).lstrip("-")
            caption = f"{layout.caption} ({part})" if part else layout.caption
            source = f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"
            pictures.append(Picture(caption, f"{caption}: {alt}", source))
    return pictures


def _choices(key: str, runs: Sequence[RecordedRun]) -> list[str]:
    return list(dict.fromkeys(run.cell.point[key] for run in runs if key in run.cell.point))


def _run(run: RecordedRun, keys: Sequence[str], columns: Sequence[Column], files: dict[str, Path], folder: Path) -> Run:
    record = run.record
    values = [(column, value_of(record, column)) for column in columns]
    return Run(
        record.run_id,
        [run.cell.point.get(key, "") for key in keys],
        [Shown("" if value is None else column.metric.show(value), _number(value)) for column, value in values],
        _pruning(record),
        _seconds(record.stages),
        commit_of(record.environment["git"]),
        quote(Path(os.path.relpath(files[record.run_id], folder)).as_posix()),
        _yaml(record.configuration),
        _shared_yaml(json.dumps(record.environment)),
        _stages(record),
    )


def _pruning(record: RunRecord) -> Shown:
    """Return the seconds of pruning with empty caches, where the record has them."""
    seconds = pruning_seconds(record)
    if seconds is None:
        return _seconds([stage for stage in record.stages if stage["name"] in PRUNING])
    return Shown(f"{seconds:,.2f}", _number(seconds))


def _seconds(stages: Sequence[dict[str, Any]]) -> Shown:
    """Return the sum over the stages, marked where a stage was read from the cache."""
    if not stages:
        return Shown("", "")
    total = sum(stage["seconds"] for stage in stages)
    cached = any(stage["cached"] for stage in stages)
    return Shown(f"{total:,.2f}{' (cached)' if cached else ''}", _number(total))


def _stages(record: RunRecord) -> list[tuple[str, str, str]]:
    """Return name, seconds and peak memory of each stage; the memory is that of the GPUs where there are any."""
    size = describe("cost", "checkpoint", "bytes").show
    rows = []
    for stage in record.stages:
        peak = stage.get("peak_gpu_bytes") or stage.get("peak_bytes")
        cached = " (cached)" if stage["cached"] else ""
        rows.append((stage["name"], f"{stage['seconds']:,.2f}{cached}", size(peak) if peak else ""))
    return rows


def _number(value: float | None) -> str:
    """Write a number as JavaScript reads it; empty for None and NaN."""
    if value is None or math.isnan(value):
        return ""
    return repr(value) if math.isfinite(value) else "-Infinity" if value < 0 else "Infinity"


@lru_cache(maxsize=64)
def _shared_yaml(content: str) -> str:
    """Write JSON as YAML, once for all the runs that share it."""
    return _yaml(json.loads(content))


def _yaml(values: Any) -> str:
    return yaml.dump(values, Dumper=_DUMPER, sort_keys=False, allow_unicode=True, width=100).rstrip()
