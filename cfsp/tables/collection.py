"""Records of an experiment, matched to its runs by their configuration and never by the name of a file."""

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
        cell: the run of the grid.
        record: the record of the run.
        as_shipped: True if the command line changed nothing that decides the figures of the run.
    """

    cell: Cell
    record: RunRecord
    as_shipped: bool = True

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.record.configuration["seed"])


@dataclass(frozen=True)
class Collection:
    """Records of an experiment's grid.

    Attributes:
        runs: cells with a record, in the order of the grid.
        missing: cells without a record.
        damaged: one line for each file that is not a usable record.
        files: run_id of a record -> its path.
        keys: run_id of a record -> its :func:`configuration_key`.
    """

    runs: list[RecordedRun]
    missing: list[Cell]
    damaged: list[str]
    files: dict[str, Path]
    keys: dict[str, str] = field(default_factory=dict)


def collect_records(cells: Sequence[Cell], folder: Path, composer: GridComposer | None = None) -> Collection:
    """Find the record of each cell in ``folder``.

    Args:
        cells: runs of the experiment, in the order of the grid.
        folder: folder with the records.
        composer: composer to reuse if it has composed some of the cells already.

    Raises:
        ConfigError: the folder does not exist, the records were written by several versions of the methods, or several
            records belong to one cell.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"paths.records_dir={folder}: no such folder; run the sweep first, or say where its records are"
        )
    composer = composer or GridComposer()
    # Before the records are read: composing imports the plugin classes of the cells, which reading needs.
    configurations = [composer.config(cell.overrides) for cell in cells]
    damaged: list[str] = []
    by_science: dict[str, list[tuple[RunRecord, Parts]]] = {}
    files: dict[str, Path] = {}
    keys: dict[str, str] = {}
    for path, record, parts in _read_records(folder, damaged):
        files[record.run_id] = path
        keys[record.run_id] = digest(parts.values)
        by_science.setdefault(keys[record.run_id], []).append((record, parts))
    runs, missing = [], []
    for cell, config in zip(cells, configurations, strict=True):
        expected = configuration_parts(config.raw)
        records = [
            record
            for record, parts in by_science.get(digest(expected.values), ())
            if expected.places == parts.places or _has_same_inputs(config, record)
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
    _check_single_version([run.record for run in runs])
    return Collection(runs, missing, damaged, files, keys)


def _has_same_inputs(config: RunConfig, record: RunRecord) -> bool:
    """Return whether the inputs of the record have the same content as those of ``config``, whatever their paths."""
    # Start-up time: loads numpy, safetensors, torch.
    from cfsp.pipeline.preflight import prepare

    try:
        identity = prepare(config).identity
    except CfspError:  # an input of the cell is not on this machine, so it cannot be compared with the record
        return False
    machine_dependent = {"dtype", "version"}
    return all(identity[key] == record.identity.get(key) for key in identity.keys() - machine_dependent)


def cell_key(cell: Cell, composer: GridComposer | None = None) -> str:
    """Return the :func:`configuration_key` of a cell."""
    return configuration_key((composer or GridComposer()).config(cell.overrides).raw)


def configuration_key(configuration: Mapping[str, Any]) -> str:
    """Return a hash of the settings that decide the figures of a run; the paths of its inputs do not count."""
    return digest(configuration_parts(configuration).values)


def _read_records(folder: Path, damaged: list[str]) -> Iterator[tuple[Path, RunRecord, Parts]]:
    """Yield each complete record of a successful run with the parts of its configuration.

    Each unusable file adds a line to ``damaged``.
    """
    for path in sorted(folder.glob("*.json")):
        try:
            record = RunRecord.read(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        if record is None:  # a broken link, or a file that was removed after the folder was listed
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


def _check_single_version(records: Sequence[RunRecord]) -> None:
    """Check that all records were written by the current version of the methods.

    Raises:
        ConfigError: a record was written by another version.
    """
    versions = {record.identity.get("version"): record.run_id for record in records}
    if len(versions) > 1 or (versions and METHOD_VERSION not in versions):
        run_ids = ", ".join(f"{run_id} of version {version}" for version, run_id in sorted(versions.items()))
        raise ConfigError(
            f"records of other versions of the methods than {METHOD_VERSION}: {run_ids}; run these again (force=true)"
        )
