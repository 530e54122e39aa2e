"""Jobs: the runs of a sweep with their identities, the state of each, and running it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cfsp.config.compose import compose
from cfsp.config.identity import digest
from cfsp.config.parse import parse
from cfsp.config.run_config import RunConfig
from cfsp.errors import BusyError, CfspError, CheckpointError, ConfigError
from cfsp.pipeline.base_models import BaseModels
from cfsp.pipeline.preflight import prepare
from cfsp.pipeline.run import run
from cfsp.record.finished import lacking
from cfsp.record.run_record import RunRecord
from cfsp.sweep.experiment import Cell
from cfsp.sweep.state import State, error_of, state_in
from cfsp.system.progress import progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A run of a sweep.

    Attributes:
        cell: its place in the grid.
        config: its configuration.
        run_id: its id.
        out: its folder OUT.
        record: path of its record.
        shares: hash of what it calibrates on, equal for all runs that share statistics.
        saves: whether it leaves a model folder.
    """

    cell: Cell
    config: RunConfig
    run_id: str
    out: Path
    record: Path
    shares: str
    saves: bool

    @property
    def is_done(self) -> bool:
        """True where its record is of a success and its files are whole.

        Raises:
            CheckpointError: the file in the record's place is not a record.
        """
        record = RunRecord.read(self.record)
        return (
            record is not None
            and record.succeeded
            and lacking(record, self.out, model=self.saves, hashes=self.config.check_files) is None
        )


@dataclass(frozen=True)
class Outcome:
    """End of a job.

    Attributes:
        name: done, failed, or busy (another process is at it).
        reason: why it failed, or who is at it.
        seconds: how long it took.
    """

    name: str
    reason: str = ""
    seconds: float = 0.0


def jobs_of(cells: Iterable[Cell]) -> list[Job]:
    """Compose and check every run with all its inputs. Cells with the same run id become a single job.

    Raises:
        ConfigError: every problem of every run, each once.
    """
    problems: dict[str, None] = {}
    configs: list[tuple[Cell, RunConfig]] = []
    for cell in cells:
        try:
            configs.append((cell, parse(compose(cell.overrides))))
        except CfspError as error:
            problems.update(dict.fromkeys(error.problems))
    jobs: dict[str, Job] = {}
    for cell, config in progress(configs, "check", unit="run"):
        try:
            prepared = prepare(config)
        except CfspError as error:
            problems.update(dict.fromkeys(error.problems))
            continue
        pruning = prepared.identity["pruning"] or {}
        shares = digest([prepared.identity["model"], prepared.identity["dtype"], pruning.get("calibration")])
        out = Path(config.paths.output_dir) / prepared.run_id
        record = Path(config.paths.records_dir) / f"{prepared.run_id}.json"
        saves = config.save.model and config.pruner.instance.prunes
        jobs.setdefault(prepared.run_id, Job(cell, config, prepared.run_id, out, record, shares, saves))
    if problems:
        raise ConfigError(*problems)
    return list(jobs.values())


def state_of(job: Job) -> State:
    """Return the state of a job, by its record and its folder."""
    try:
        if job.is_done:
            repeat = RunRecord.read(job.out / "record.repeat.json")
            return State("done", f"its repeat failed: {error_of(repeat)}" if repeat is not None else "")
    except CheckpointError as error:
        return State("failed", str(error))
    return state_in(job.out)


def do(request: RunConfig | Sequence[str], bases: BaseModels) -> Outcome:
    """Run a job in this process; an error becomes a line of the outcome, the record holds the rest.

    Args:
        request: its configuration, or the overrides of its command line.
        bases: keeps the base model between jobs.
    """
    start = time.perf_counter()
    try:
        run(request if isinstance(request, RunConfig) else parse(compose(request)), multirun=True, bases=bases)
    except BusyError as error:
        return Outcome("busy", str(error))
    except Exception as error:  # whatever one run does, the others go on
        log.debug("run failed", exc_info=error)
        kind = "" if isinstance(error, CfspError) else f"{type(error).__name__}: "
        return Outcome("failed", f"{kind}{_line(str(error))}", time.perf_counter() - start)
    return Outcome("done", "", time.perf_counter() - start)


def mark_failed(job: Job, reason: str) -> None:
    """Write into the record of a run why its process ended, which cannot write it any more."""
    record = None
    with contextlib.suppress(CheckpointError):
        record = RunRecord.read(job.out / "record.json")
    record = record or RunRecord(job.run_id)  # it died before it wrote one, or while it did
    if record.status != "success":
        record.error = {"type": "ProcessDied", "message": reason}
        record.write(job.out / "record.json")


def _line(text: str) -> str:
    return " ".join(text.split())
