"""Records of an experiment, looked up by what their configuration decides, never by the name of a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfsp.config.deciding import Parts
from cfsp.config.identity import METHOD_VERSION, configuration_parts, digest
from cfsp.config.run_config import RunConfig
from cfsp.errors import CfspError, CheckpointError, ConfigError
from cfsp.record.run_record import RunRecord
from cfsp.sweep.composer import GridComposer
from cfsp.sweep.experiment import Cell


@dataclass(frozen=True)
class RecordedRun:
    """A run of the grid with its record.

    Attributes:
        cell: its place in the grid.
        record: its record.
        as_shipped: the command line changed nothing that decides its figures.
    """

    cell: Cell
    record: RunRecord
    as_shipped: bool = True

    @property
    def seed(self) -> int:
        return int(self.record.configuration["seed"])


@dataclass(frozen=True)
class Collection:
    """Records of an experiment's grid.

    Attributes:
        runs: cells with a record, in the order of the grid.
        missing: cells without a record.
        damaged: one line for each file that is no record.
        files: path of each record by its run_id.
        keys: run_id -> :func:`science` of each record.
    """

    runs: list[RecordedRun]
    missing: list[Cell]
    damaged: list[str]
    files: dict[str, Path]
    keys: dict[str, str] = field(default_factory=dict)


def collect(cells: Sequence[Cell], folder: Path, composer: GridComposer | None = None) -> Collection:
    """Find the records in ``folder`` that the ``cells`` ask for.

    Args:
        composer: one that has composed some of the cells already.

    Raises:
        ConfigError: no such folder, records of two versions of the methods, two for one cell.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"paths.records_dir={folder}: no such folder; run the sweep first, or say where its records are"
        )
    composer = composer or GridComposer()
    # First: this imports the classes of other packages that the cells name, which the records' settings are read by.
    configurations = [composer.config(cell.overrides) for cell in cells]
    damaged: list[str] = []
    by_science: dict[str, list[tuple[RunRecord, Parts]]] = {}
    files: dict[str, Path] = {}
    keys: dict[str, str] = {}
    for path, record, parts in _read(folder, damaged):
        files[record.run_id] = path
        keys[record.run_id] = digest(parts.values)
        by_science.setdefault(keys[record.run_id], []).append((record, parts))
    runs, missing = [], []
    for cell, config in zip(cells, configurations, strict=True):
        expected = configuration_parts(config.raw)
        records = [
            record
            for record, parts in by_science.get(digest(expected.values), ())
            if expected.places == parts.places or _same_contents(config, record)
        ]
        current = [record for record in records if record.identity["version"] == METHOD_VERSION]
        records = current or records
        if len(records) > 1:
            names = ", ".join(sorted(record.run_id for record in records))
            raise ConfigError(
                f"{cell}: several records in {folder} are of this run ({names}): they differ in content or dtype; "
                "keep one"
            )
        if records:
            runs.append(RecordedRun(cell, records[0]))
        else:
            missing.append(cell)
    _one_version([run.record for run in runs])
    return Collection(runs, missing, damaged, files, keys)


def _same_contents(config: RunConfig, record: RunRecord) -> bool:
    """Return whether the record was measured on inputs of the same content, at other paths."""
    # Start-up time: loads numpy, safetensors, torch.
    from cfsp.pipeline.preflight import prepare

    try:
        identity = prepare(config).identity
    except CfspError:  # what the cell names is not here: nothing says that the record is of it
        return False
    of_machine = {"dtype", "version"}
    return all(identity[key] == record.identity.get(key) for key in identity.keys() - of_machine)


def science_of(cell: Cell, composer: GridComposer | None = None) -> str:
    """:func:`science` of the run that a cell asks for."""
    return science((composer or GridComposer()).config(cell.overrides).raw)


def science(configuration: Mapping[str, Any]) -> str:
    """A hash of the configuration without what decides no figure, and without the places of its inputs."""
    return digest(configuration_parts(configuration).values)


def _read(folder: Path, damaged: list[str]) -> Iterator[tuple[Path, RunRecord, Parts]]:
    """Yield every whole record of a success with the parts of its configuration; others get a line in ``damaged``."""
    for path in sorted(folder.glob("*.json")):
        try:
            record = RunRecord.read(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        if record is None:  # a link to nothing, or gone since the folder was listed
            damaged.append(f"{path}: not a run record (there is no such file)")
            continue
        problem = record.problem()
        parts = None
        if problem is None and record.status == "success":
            try:
                parts = configuration_parts(record.configuration)
            except (AttributeError, KeyError, TypeError, ValueError):
                problem = "its configuration is not that of a run"
        elif problem is None and record.status != "failed":
            problem = f"status {str(record.status)[:40]!r}"
        if problem is not None:
            damaged.append(f"{path}: not a whole run record ({problem})")
        elif parts is not None:
            yield path, record, parts


def _one_version(records: Sequence[RunRecord]) -> None:
    versions = {record.identity.get("version"): record.run_id for record in records}
    if len(versions) > 1 or (versions and METHOD_VERSION not in versions):
        run_ids = ", ".join(f"{run_id} of version {version}" for version, run_id in sorted(versions.items()))
        raise ConfigError(
            f"records of other versions of the methods than {METHOD_VERSION}: {run_ids}; run these again (force=true)"
        )
