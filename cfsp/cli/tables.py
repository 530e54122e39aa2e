"""``cfsp tables experiment=NAME [variant=...]``: make the tables and figures of an experiment from its records."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cfsp.config.compose import compose
from cfsp.config.parse import parse
from cfsp.errors import ConfigError
from cfsp.sweep.composer import GridComposer
from cfsp.sweep.experiment import experiment_folder, override_values
from cfsp.sweep.request import Request, records_folder, request_of
from cfsp.system import escape
from cfsp.system.command import command
from cfsp.tables.collection import Collection, collect, science_of
from cfsp.tables.figures import draw
from cfsp.tables.grid import NothingToShowError, table
from cfsp.tables.layout import Layout, load_layout
from cfsp.tables.render import comma_separated, latex, markdown

USAGE = """\
Render the tables (Markdown, LaTeX, CSV) and figures (PNG, SVG) of an experiment from its records.

  cfsp tables experiment=NAME [variant=bundled]

The layout is experiments/NAME/tables.yaml, the records are in results/records/NAME/VARIANT (paths.records_dir), what is
made goes to results/tables/NAME/VARIANT and results/figures/NAME/VARIANT (results=FOLDER). Other key=value choose among
the experiment's runs as they do for cfsp sweep. logger=wandb keeps what is made as an artifact of a W&B run in
the sweep's group (offline: in outputs/tables/NAME/VARIANT). Exit codes: 0; 1 a damaged record was left out; 2 wrong
input.
"""


def main(overrides: Sequence[str] | None = None) -> int:
    """Make the tables and figures; returns the exit code."""
    return command("tables", USAGE, overrides, _tables)


def _tables(overrides: Sequence[str]) -> int:
    values = override_values(overrides)
    results = Path(str(values.get("results", "results")))
    if not values.get("results", "results"):
        raise ConfigError("results= is empty: give a folder")
    overrides = [word for word in overrides if not word.startswith("results=")]
    request, layout, collection = gather("tables", overrides)
    shown = contents(request, layout, collection, "cfsp tables " + " ".join(overrides))
    for line in shown.left_out:
        print(f"tables: {line}; left out", file=sys.stderr)
    for path, content in shown.files.items():
        target = results / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        except OSError as error:
            raise ConfigError(f"results={results}: {target} cannot be written ({error.strerror})") from error
    for path, content in shown.files.items():
        if path.suffix == ".md":
            print(content.decode())
    print("Written: " + " ".join(str(results / path) for path in shown.files))
    if values.get("logger", "none") != "none":
        logger = parse(compose(request.cells[0].overrides)).logger.instance
        artifact = {"/".join(path.parts): (results / path) for path in shown.files}
        folder = Path("outputs") / "tables" / request.experiment.name / request.variant
        logger.files(f"tables-{request.experiment.name}-{request.variant}", folder, artifact)
    if collection.missing:
        print(f"tables: {len(collection.missing)} of {len(request.cells)} runs have no record, their cells are empty")
    return 1 if collection.damaged else 0


def gather(tool: str, overrides: Sequence[str], *, empty: bool = False) -> tuple[Request, Layout, Collection]:
    """Read the command line, the layout of its experiment, and its records. Damaged records are named on stderr.

    Args:
        tool: name of the command, for messages.
        overrides: overrides of the command line.
        empty: whether there may be no record.

    Raises:
        ConfigError: the overrides are wrong, there is no layout, or there is no record.
    """
    request = request_of(overrides)
    records = records_of(request, overrides)
    layout = load_layout(experiment_folder(request.experiment.name, "tables.yaml")).of_variant(request.variant)
    if empty and not records.is_dir():
        return request, layout, Collection([], list(request.cells), [], {})
    composer = GridComposer()
    with _outside_collector():
        collection = collect(request.cells, records, composer)
    for line in collection.damaged:
        print(f"{tool}: warning: {escape.plain(line)}; left out", file=sys.stderr)
    if not collection.runs and not empty:
        raise no_record(request, records)
    if layout.reported:
        shipped = {science_of(cell, composer) for cell in request.experiment.cells(request.variant)}
        runs = [replace(run, as_shipped=collection.keys[run.record.run_id] in shipped) for run in collection.runs]
        collection = replace(collection, runs=runs)
    return request, layout, collection


@contextmanager
def _outside_collector() -> Iterator[None]:
    """Keep what is read here out of Python's search for cyclic garbage: records stay until the process ends.

    The search would go through their thousands of parts again and again, a sixth of the time of 200 records.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.freeze)  # the interpreter searches everything once more when it ends
        if enabled:
            gc.enable()


def records_of(request: Request, overrides: Sequence[str]) -> Path:
    """Return the folder with the records that the overrides name."""
    default = records_folder(request.experiment.name, request.variant)
    return Path(str(override_values(overrides).get("paths.records_dir", default)))


def no_record(request: Request, records: Path) -> ConfigError:
    """Return the error of an experiment without a record."""
    problem = (
        f"no record there is of {request.experiment.name} ({request.variant})" if records.is_dir() else "no such folder"
    )
    return ConfigError(f"paths.records_dir={records}: {problem}; run the sweep first")


@dataclass(frozen=True)
class Contents:
    """Content of an experiment's files.

    Attributes:
        files: content by path below results/.
        left_out: why a table or figure has nothing to show.
    """

    files: dict[Path, bytes]
    left_out: list[str]


def contents(request: Request, layout: Layout, collection: Collection, made_by: str) -> Contents:
    """Make every file of the experiment.

    Args:
        request: the checked command line.
        layout: layout of the experiment.
        collection: its records.
        made_by: the command that the tables name.

    Raises:
        ConfigError: the records do not belong into one table, or none has a figure that a table shows.
    """
    place = Path(request.experiment.name) / request.variant
    result = Contents({}, [])
    for name, table_layout in layout.tables.items():
        with note_nothing_to_show(result.left_out):
            shown = table(name, table_layout, collection.runs, layout.reported, request.cells)
            result.files[Path("tables") / place / f"{name}.md"] = markdown(shown, made_by).encode()
            result.files[Path("tables") / place / f"{name}.tex"] = latex(shown, made_by).encode()
            result.files[Path("tables") / place / f"{name}.csv"] = comma_separated(shown).encode()
    for name, figure_layout in layout.figures.items():
        with note_nothing_to_show(result.left_out):
            for file, content in draw(name, figure_layout, collection.runs).items():
                result.files[Path("figures") / place / file] = content
    return result


@contextmanager
def note_nothing_to_show(left_out: list[str]) -> Iterator[None]:
    """Add to ``left_out`` why a table or figure has no run to show."""
    try:
        yield
    except NothingToShowError as error:
        left_out.extend(error.problems)
