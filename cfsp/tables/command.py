"""``scripts/tables.py experiment=NAME [variant=...]``: the tables and figures of an experiment, from its records."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cfsp.compose import compose
from cfsp.config import parse
from cfsp.errors import ConfigError
from cfsp.sweep.command import Request, command, records_folder, request_of
from cfsp.sweep.experiment import given_values
from cfsp.tables.collection import Collection, collect
from cfsp.tables.figures import draw
from cfsp.tables.grid import table
from cfsp.tables.layout import Layout, load_layout
from cfsp.tables.render import comma_separated, latex, markdown

USAGE = """\
Render the tables (Markdown, LaTeX, CSV) and figures (PNG, SVG) of an experiment from its records.

  python scripts/tables.py experiment=NAME [variant=bundled]

The layout is experiments/NAME/tables.yaml, the records are in results/records/NAME/VARIANT (paths.records_dir), what is
made goes to results/tables/NAME/VARIANT and results/figures/NAME/VARIANT (results=FOLDER). Other key=value choose among
the experiment's runs as they do for scripts/sweep.py. logger=wandb keeps what is made as an artifact of a W&B run in
the sweep's group (offline: in outputs/tables/NAME/VARIANT). Exit codes: 0; 1 a damaged record was left out; 2 wrong
input.
"""


def main(words: Sequence[str] | None = None) -> int:
    """Make the tables; returns the exit code."""
    return command("tables", USAGE, words, _tables)


def _tables(words: Sequence[str]) -> int:
    values = given_values(words)
    results = Path(str(values.get("results", "results")))
    words = [word for word in words if not word.startswith("results=")]
    request, layout, collection = gather("tables", words)
    files = contents(request, layout, collection, "python scripts/tables.py " + " ".join(words))
    for path, content in files.items():
        target = results / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    for path, content in files.items():
        if path.suffix == ".md":
            print(content.decode())
    print("Written: " + " ".join(str(results / path) for path in files))
    if values.get("logger", "none") != "none":
        logger = parse(compose(request.cells[0].words)).logger.instance
        made = {"/".join(path.parts): (results / path) for path in files}
        folder = Path("outputs") / "tables" / request.experiment.name / request.variant
        logger.files(f"tables-{request.experiment.name}-{request.variant}", folder, made)
    if collection.missing:
        print(f"tables: {len(collection.missing)} of {len(request.cells)} runs have no record, their cells are empty")
    return 1 if collection.damaged else 0


def gather(tool: str, words: Sequence[str]) -> tuple[Request, Layout, Collection]:
    """What the words ask for, its layout and its records; says on stderr, as ``tool``, what is damaged.

    Raises:
        ConfigError: the words are wrong, there is no layout, or no record.
    """
    request = request_of(words)
    name, variant = request.experiment.name, request.variant
    records = Path(str(given_values(words).get("paths.records_dir", records_folder(name, variant))))
    layout = load_layout(Path("experiments") / name)
    collection = collect(request.cells, records)
    for line in collection.damaged:
        print(f"{tool}: warning: {line}; left out", file=sys.stderr)
    if not collection.found:
        raise ConfigError(f"paths.records_dir={records}: no record there is of {name} ({variant}); run the sweep first")
    return request, layout, collection


def contents(request: Request, layout: Layout, collection: Collection, made_by: str) -> dict[Path, bytes]:
    """Path below results/ -> content of every file of the experiment."""
    place = Path(request.experiment.name) / request.variant
    files: dict[Path, bytes] = {}
    for name, one in layout.tables.items():
        made = table(name, one, collection.found, layout.reported)
        files[Path("tables") / place / f"{name}.md"] = markdown(made, made_by).encode()
        files[Path("tables") / place / f"{name}.tex"] = latex(made, made_by).encode()
        files[Path("tables") / place / f"{name}.csv"] = comma_separated(made).encode()
    for name, figure in layout.figures.items():
        for file, content in draw(name, figure, collection.found).items():
            files[Path("figures") / place / file] = content
    return files
