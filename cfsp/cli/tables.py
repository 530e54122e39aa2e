"""``cfsp tables experiment=NAME [variant=...]``: build the tables and figures of an experiment from its records."""

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
from cfsp.errors import ConfigError, at_most
from cfsp.sweep.composer import GridComposer
from cfsp.sweep.experiment import experiment_folder, override_values
from cfsp.sweep.request import Request, read_request, records_folder
from cfsp.system import escape
from cfsp.system.command import command
from cfsp.tables.collection import Collection, cell_key, collect_records
from cfsp.tables.figures import draw_figure
from cfsp.tables.grid import NothingToShowError, build_table
from cfsp.tables.layout import Layout, load_layout
from cfsp.tables.render import render_csv, render_latex, render_markdown

#: Damaged records that are named one by one; a line counts those beyond.
_MOST_NAMED = 5

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
    """Write the tables and figures and return the exit code."""
    return command("tables", USAGE, overrides, _tables)


def _tables(overrides: Sequence[str]) -> int:
    values = override_values(overrides)
    results = Path(str(values.get("results", "results")))
    if not values.get("results", "results"):
        raise ConfigError("results= is empty: give a folder")
    overrides = [word for word in overrides if not word.startswith("results=")]
    request, layout, collection = load_results("tables", overrides)
    shown = render_files(request, layout, collection, "cfsp tables " + " ".join(overrides))
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


def load_results(tool: str, overrides: Sequence[str], *, empty: bool = False) -> tuple[Request, Layout, Collection]:
    """Load the layout and the records of the experiment on the command line; warn of damaged records on stderr.

    Args:
        tool: name of the command, for messages.
        overrides: overrides of the command line.
        empty: accept an experiment without any record.

    Returns:
        The checked command line, the layout of the variant, and its records.

    Raises:
        ConfigError: the overrides are wrong, there is no layout, or there is no record.
    """
    request = read_request(overrides)
    records = records_path(request, overrides)
    layout = load_layout(experiment_folder(request.experiment.name, "tables.yaml")).for_variant(request.variant)
    if empty and not records.is_dir():
        return request, layout, Collection([], list(request.cells), [], {})
    composer = GridComposer()
    with _pause_garbage_collector():
        collection = collect_records(request.cells, records, composer)
    for line in at_most([f"{escape.plain(damaged)}; left out" for damaged in collection.damaged], _MOST_NAMED):
        print(f"{tool}: warning: {line}", file=sys.stderr)
    if not collection.runs and not empty:
        raise no_record_error(request, records)
    if layout.reported:
        shipped = {cell_key(cell, composer) for cell in request.experiment.cells(request.variant)}
        runs = [replace(run, as_shipped=collection.keys[run.record.run_id] in shipped) for run in collection.runs]
        collection = replace(collection, runs=runs)
    return request, layout, collection


@contextmanager
def _pause_garbage_collector() -> Iterator[None]:
    """Pause the cyclic garbage collector inside the context, and exclude the objects created there from it.

    Records stay in memory until the process ends. Searching them for garbage takes a sixth of the time for 200 records.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.freeze)  # the interpreter runs the collector once more when it ends
        if enabled:
            gc.enable()


def records_path(request: Request, overrides: Sequence[str]) -> Path:
    """Return the folder of the records: ``paths.records_dir``, or the default of the experiment."""
    default = records_folder(request.experiment.name, request.variant)
    return Path(str(override_values(overrides).get("paths.records_dir", default)))


def no_record_error(request: Request, records: Path) -> ConfigError:
    """Return the error for an experiment without any record."""
    problem = (
        f"no record there is of {request.experiment.name} ({request.variant})" if records.is_dir() else "no such folder"
    )
    return ConfigError(f"paths.records_dir={records}: {problem}; run the sweep first")


@dataclass(frozen=True)
class RenderedFiles:
    """Rendered tables and figures of an experiment.

    Attributes:
        files: path below results/ -> content.
        left_out: reasons why tables or figures have nothing to show.
    """

    files: dict[Path, bytes]
    left_out: list[str]


def render_files(request: Request, layout: Layout, collection: Collection, made_by: str) -> RenderedFiles:
    """Render every table and figure of the experiment.

    Args:
        request: the checked command line.
        layout: layout of the experiment.
        collection: records of the experiment.
        made_by: the command that the tables name.

    Raises:
        ConfigError: the records of a table cannot be combined, or no record has a figure that a table shows.
    """
    place = Path(request.experiment.name) / request.variant
    result = RenderedFiles({}, [])
    for name, table_layout in layout.tables.items():
        with note_nothing_to_show(result.left_out):
            shown = build_table(name, table_layout, collection.runs, layout.reported, request.cells)
            result.files[Path("tables") / place / f"{name}.md"] = render_markdown(shown, made_by).encode()
            result.files[Path("tables") / place / f"{name}.tex"] = render_latex(shown, made_by).encode()
            result.files[Path("tables") / place / f"{name}.csv"] = render_csv(shown).encode()
    for name, figure_layout in layout.figures.items():
        with note_nothing_to_show(result.left_out):
            for file, content in draw_figure(name, figure_layout, collection.runs).items():
                result.files[Path("figures") / place / file] = content
    return result


@contextmanager
def note_nothing_to_show(left_out: list[str]) -> Iterator[None]:
    """Add the reason to ``left_out`` if a table or figure inside the context has no run to show."""
    try:
        yield
    except NothingToShowError as error:
        left_out.extend(error.problems)
