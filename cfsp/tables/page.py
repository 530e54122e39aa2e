"""A sweep as one HTML page: its tables, figures and runs. The page carries all it shows and asks no network."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from cfsp.tables.collection import Collection, Found
from cfsp.tables.figures import draw
from cfsp.tables.grid import (
    PRUNING,
    PRUNING_TIME,
    Column,
    NothingToShowError,
    Row,
    Table,
    pruning_seconds,
    table,
    value_of,
)
from cfsp.tables.layout import FigureLayout, Layout
from cfsp.tables.metrics import describe
from cfsp.tables.render import commit_of, notes, plain_cells, provenance, sources

#: The one in C is ten times as fast, and writes the same.
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


@dataclass(frozen=True)
class Shown:
    """A cell: its text, what it is sorted by ("": nothing, so last), and the rank of a table's entry."""

    text: str
    value: str
    rank: int = 0


@dataclass(frozen=True)
class Picture:
    """An SVG figure; ``alt`` says what is drawn, the caption what it shows."""

    caption: str
    alt: str
    source: str


@dataclass(frozen=True)
class Contents:
    """Tables and figures of a layout; ``refused``: why one of them cannot be made while runs are missing."""

    tables: list[Table]
    pictures: list[Picture]
    refused: list[str]


@dataclass(frozen=True)
class Run:
    """A run of the sweep; ``keys``, then ``figures``, as the heads say; ``link``: its record, seen from the page."""

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
    """What can be made of the records that there are; ``cells``: the runs that there should be.

    Raises:
        ConfigError: there are all, and yet a table or figure cannot be made of them.
    """
    made = Contents([], [], [])
    if not collection.found:
        return made
    for name, one in layout.tables.items():
        with _refusal(made, collection):
            made.tables.append(table(name, one, collection.found, layout.reported, cells))
    for name, figure in layout.figures.items():
        with _refusal(made, collection):
            made.pictures.extend(_pictures(name, figure, collection.found))
    return made


@contextmanager
def _refusal(made: Contents, collection: Collection) -> Iterator[None]:
    try:
        yield
    except NothingToShowError as error:
        if collection.missing:
            made.refused.extend(error.problems)
    except ConfigError as error:
        if not collection.missing:
            raise
        made.refused.extend(error.problems)


def page(
    request: Request,
    made: Contents,
    collection: Collection,
    missing: Sequence[tuple[Cell, State]],
    folder: Path,
    words: Sequence[str],
) -> bytes:
    """The page, to be written into ``folder``; the same bytes from the same records.

    Args:
        missing: the runs without a record, with what is known of them.
        words: of the command line, for the commands that the page names.
    """
    columns = list({column.metric.label: column for one in made.tables for column in one.columns}.values())
    columns = [column for column in columns if column != PRUNING_TIME]  # has a column of its own
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
        done=len(collection.found),
        wanted=len(request.cells),
        missing=[(state, request.named(cell)) for cell, state in missing],
        counts=sorted(Counter(state.name for _, state in missing).items()),
        damaged=collection.damaged,
        tables=[
            (
                one,
                _heads(one),
                [(label, _rows(one, rows)) for label, rows in one.sections],
                [*notes(one), *sources(one)],
            )
            for one in made.tables
        ],
        pictures=made.pictures,
        refused=made.refused,
        keys=request.varying,
        choices=[_choices(key, collection.found) for key in request.varying],
        columns=columns,
        runs=[_run(one, request.varying, columns, collection.files, folder) for one in collection.found],
        pruning=", ".join(PRUNING),
        provenance=provenance(list({one.record.run_id: one.record for one in collection.found}.values()))
        if collection.found
        else [],
        words=shlex.join(words),
    )
    return (html + "\n").encode()


def _policy(script: str, style: str) -> str:
    """No source but the page's own script, style and pictures: nothing is fetched, and no value can become code."""
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
    """Label and direction of every column but the first."""
    heads = []
    for at, column in enumerate(table.columns):
        heads.append((column.metric.label, column.metric.better))
        heads += [("published", 0), ("deviation", 0)] if table.is_published(at) else []
    return heads


def _pictures(name: str, layout: FigureLayout, found: Sequence[Found]) -> list[Picture]:
    alt = {
        "curve": f"{layout.metric} against {layout.x}, a line for each {' and '.join(layout.lines)}",
        "pareto": f"{layout.metric} against {layout.x_metric}, a line for each {' and '.join(layout.lines)}",
        "blocks": f"kept width and importance of each block, a panel for each {' and '.join(layout.panels)}",
    }[layout.kind]
    pictures = []
    for file, content in draw(name, layout, found).items():
        if file.endswith(".svg"):
            of = file.removesuffix(".svg").removeprefix(name).lstrip("-")
            caption = f"{layout.caption} ({of})" if of else layout.caption
            source = f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"
            pictures.append(Picture(caption, f"{caption}: {alt}", source))
    return pictures


def _choices(key: str, found: Sequence[Found]) -> list[str]:
    return list(dict.fromkeys(one.cell.point[key] for one in found if key in one.cell.point))


def _run(found: Found, keys: Sequence[str], columns: Sequence[Column], files: dict[str, Path], folder: Path) -> Run:
    record = found.record
    values = [(column, value_of(record, column)) for column in columns]
    return Run(
        record.run_id,
        [found.cell.point.get(key, "") for key in keys],
        [Shown("" if value is None else column.metric.show(value), _number(value)) for column, value in values],
        _pruning(record),
        _seconds(record.stages),
        commit_of(record.environment["git"]),
        quote(Path(os.path.relpath(files[record.run_id], folder)).as_posix()),
        _yaml(record.configuration),
        _yaml(record.environment),
        _stages(record),
    )


def _pruning(record: RunRecord) -> Shown:
    """As if nothing had been cached, where the record knows what that would have cost."""
    seconds = pruning_seconds(record)
    if seconds is None:
        return _seconds([stage for stage in record.stages if stage["name"] in PRUNING])
    return Shown(f"{seconds:,.2f}", _number(seconds))


def _seconds(stages: Sequence[dict[str, Any]]) -> Shown:
    """The sum; says whether something came from the cache, which is no measurement of the method."""
    if not stages:
        return Shown("", "")
    total = sum(stage["seconds"] for stage in stages)
    cached = any(stage["cached"] for stage in stages)
    return Shown(f"{total:,.2f}{' (cached)' if cached else ''}", _number(total))


def _stages(record: RunRecord) -> list[tuple[str, str, str]]:
    """Name, seconds, peak memory: of the device where there is one."""
    size = describe("cost", "checkpoint", "bytes").show
    rows = []
    for stage in record.stages:
        peak = stage.get("peak_gpu_bytes") or stage.get("peak_bytes")
        cached = " (cached)" if stage["cached"] else ""
        rows.append((stage["name"], f"{stage['seconds']:,.2f}{cached}", size(peak) if peak else ""))
    return rows


def _number(value: float | None) -> str:
    """As a script reads numbers."""
    if value is None or math.isnan(value):
        return ""
    return repr(value) if math.isfinite(value) else "-Infinity" if value < 0 else "Infinity"


def _yaml(values: Any) -> str:
    return yaml.dump(values, Dumper=_DUMPER, sort_keys=False, allow_unicode=True, width=100).rstrip()
