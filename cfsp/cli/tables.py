"""``cfsp tables experiment=NAME [variant=...]``: the tables and figures of an experiment, from its records."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cfsp.config.compose import compose
from cfsp.config.parse import parse
from cfsp.errors import ConfigError
from cfsp.sweep.composer import GridComposer
from cfsp.sweep.experiment import experiment_folder, given_values
from cfsp.sweep.request import Request, records_folder, request_of
from cfsp.system import escape
from cfsp.system.command import command
from cfsp.tables.collection import Collection, collect, science, science_of
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


def main(words: Sequence[str] | None = None) -> int:
    """Make the tables; returns the exit code."""
    return command("tables", USAGE, words, _tables)


def _tables(words: Sequence[str]) -> int:
    values = given_values(words)
    results = Path(str(values.get("results", "results")))
    if not values.get("results", "results"):
        raise ConfigError("results= is empty: give a folder")
    words = [word for word in words if not word.startswith("results=")]
    request, layout, collection = gather("tables", words)
    made = contents(request, layout, collection, "cfsp tables " + " ".join(words))
    for line in made.left_out:
        print(f"tables: {line}; left out", file=sys.stderr)
    for path, content in made.files.items():
        target = results / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        except OSError as error:
            raise ConfigError(f"results={results}: {target} cannot be written ({error.strerror})") from error
    for path, content in made.files.items():
        if path.suffix == ".md":
            print(content.decode())
    print("Written: " + " ".join(str(results / path) for path in made.files))
    if values.get("logger", "none") != "none":
        logger = parse(compose(request.cells[0].words)).logger.instance
        kept = {"/".join(path.parts): (results / path) for path in made.files}
        folder = Path("outputs") / "tables" / request.experiment.name / request.variant
        logger.files(f"tables-{request.experiment.name}-{request.variant}", folder, kept)
    if collection.missing:
        print(f"tables: {len(collection.missing)} of {len(request.cells)} runs have no record, their cells are empty")
    return 1 if collection.damaged else 0


def gather(tool: str, words: Sequence[str], *, empty: bool = False) -> tuple[Request, Layout, Collection]:
    """What the words ask for, its layout and its records; says on stderr, as ``tool``, what is damaged.

    ``empty``: there may be no record.

    Raises:
        ConfigError: the words are wrong, there is no layout, or no record.
    """
    request = request_of(words)
    records = records_of(request, words)
    layout = load_layout(experiment_folder(request.experiment.name, "tables.yaml"))
    if empty and not records.is_dir():
        return request, layout, Collection([], list(request.cells), [], {})
    composer = GridComposer()
    collection = collect(request.cells, records, composer)
    for line in collection.damaged:
        print(f"{tool}: warning: {escape.plain(line)}; left out", file=sys.stderr)
    if not collection.found and not empty:
        raise no_record(request, records)
    if layout.reported:
        shipped = {science_of(cell, composer) for cell in request.experiment.cells(request.variant)}
        found = [replace(one, as_shipped=science(one.record.configuration) in shipped) for one in collection.found]
        collection = replace(collection, found=found)
    return request, layout, collection


def records_of(request: Request, words: Sequence[str]) -> Path:
    """Where the records are that the words ask for."""
    usual = records_folder(request.experiment.name, request.variant)
    return Path(str(given_values(words).get("paths.records_dir", usual)))


def no_record(request: Request, records: Path) -> ConfigError:
    """What is said where nothing is to be shown."""
    there = (
        f"no record there is of {request.experiment.name} ({request.variant})" if records.is_dir() else "no such folder"
    )
    return ConfigError(f"paths.records_dir={records}: {there}; run the sweep first")


@dataclass(frozen=True)
class Contents:
    """``files``: path below results/ -> content; ``left_out``: why a table or figure has nothing to show."""

    files: dict[Path, bytes]
    left_out: list[str]


def contents(request: Request, layout: Layout, collection: Collection, made_by: str) -> Contents:
    """Every file of the experiment.

    Raises:
        ConfigError: the records do not belong into one table, or none has what a table shows.
    """
    place = Path(request.experiment.name) / request.variant
    made = Contents({}, [])
    for name, one in layout.tables.items():
        with nothing_to_show(made.left_out):
            shown = table(name, one, collection.found, layout.reported, request.cells)
            made.files[Path("tables") / place / f"{name}.md"] = markdown(shown, made_by).encode()
            made.files[Path("tables") / place / f"{name}.tex"] = latex(shown, made_by).encode()
            made.files[Path("tables") / place / f"{name}.csv"] = comma_separated(shown).encode()
    for name, figure in layout.figures.items():
        with nothing_to_show(made.left_out):
            for file, content in draw(name, figure, collection.found).items():
                made.files[Path("figures") / place / file] = content
    return made


@contextmanager
def nothing_to_show(left_out: list[str]) -> Iterator[None]:
    """Note what a table or figure says that none of the chosen runs belongs to."""
    try:
        yield
    except NothingToShowError as error:
        left_out.extend(error.problems)
