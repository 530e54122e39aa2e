"""``cfsp report experiment=NAME [variant=...]``: write the tables, figures and runs of a sweep to one HTML file."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cfsp.cli.tables import load_results, no_record_error, records_path
from cfsp.errors import CheckpointError, ConfigError
from cfsp.record.run_record import RunRecord
from cfsp.sweep.composer import GridComposer
from cfsp.sweep.experiment import Cell
from cfsp.sweep.state import State, folder_state
from cfsp.system.command import command
from cfsp.tables.collection import cell_key, configuration_key
from cfsp.tables.page import build_contents, render_page

USAGE = """\
Write a sweep's report, one HTML file that needs no network: what is done, the experiment's tables and figures, and
every run with its figures, seconds, commit and configuration.

  cfsp report experiment=NAME [variant=bundled] [report=FILE]

The page is outputs/reports/NAME-VARIANT.html; with report=FILE that file, with results=FOLDER
FOLDER/reports/NAME/VARIANT.html. Records and other key=value as for cfsp tables; why a run has no record is read
in the runs' own folders, outputs/sweeps/NAME/VARIANT (paths.output_dir). Exit codes: 0; 1 a damaged record was left
out, or a table or figure that cannot be made while runs are missing; 2 wrong input.
"""

#: Keys of the report itself. Their values are paths, which are not parsed as overrides.
_REPORT_KEYS = ("report", "results")


def main(overrides: Sequence[str] | None = None) -> int:
    """Write the report and return the exit code."""
    return command("report", USAGE, overrides, _report)


def _report(overrides: Sequence[str]) -> int:
    own = {key: value for key, _, value in (word.partition("=") for word in overrides) if key in _REPORT_KEYS}
    overrides = [word for word in overrides if word.partition("=")[0] not in _REPORT_KEYS]
    for key in own:
        if not own[key]:
            raise ConfigError(f"{key}= is empty: give a {'file' if key == 'report' else 'folder'}")
    request, layout, collection = load_results("report", overrides, empty=True)
    unfinished = unfinished_states(collection.missing)
    if not collection.runs and all(state.name == "missing" for _, state in unfinished):
        raise no_record_error(request, records_path(request, overrides))
    file = _report_file(own, request.experiment.name, request.variant)
    shown = build_contents(layout, collection, request.cells)
    for line in shown.refused:
        print(f"report: warning: {line}; left out while runs are missing", file=sys.stderr)
    content = render_page(request, shown, collection, unfinished, file.parent, overrides)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"report={file}: cannot be written ({error.strerror})") from error
    print(f"{len(collection.runs)} of {len(request.cells)} runs have a record")
    print(f"Written: {file}")
    return 1 if collection.damaged or shown.refused else 0


def unfinished_states(cells: Sequence[Cell]) -> list[tuple[Cell, State]]:
    """Return each cell with its state, which is read from the folder of its run.

    Args:
        cells: cells without a record.
    """
    folders: dict[str, Path] = {}
    for output in sorted({cell.point["paths.output_dir"] for cell in cells}):
        for path in sorted(Path(output).glob("*/record.json")):
            try:
                record = RunRecord.read(path)
                if record is not None and record.status != "success":
                    folders.setdefault(configuration_key(record.configuration), path.parent)
            except (CheckpointError, AttributeError, KeyError, TypeError, ValueError):
                continue  # an unreadable file does not identify its run
    result, composer = [], GridComposer()
    for cell in cells:
        folder = folders.get(cell_key(cell, composer)) if folders else None
        result.append((cell, State("missing") if folder is None else folder_state(folder)))
    return result


def _report_file(own: Mapping[str, str], name: str, variant: str) -> Path:
    if "report" in own:
        return Path(own["report"])
    if "results" in own:
        return Path(own["results"]) / "reports" / name / f"{variant}.html"
    return Path("outputs") / "reports" / f"{name}-{variant}.html"
