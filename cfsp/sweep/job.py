"""Jobs of a sweep: runs with their identities, their states, and the function that executes one."""

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
from cfsp.record.finished import find_run_damage
from cfsp.record.run_record import RunRecord
from cfsp.sweep.experiment import Cell
from cfsp.sweep.state import State, error_line, folder_state
from cfsp.system.progress import progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Run of a sweep after all its inputs have been checked.

    Attributes:
        cell: the run of the grid.
        config: checked configuration.
        run_id: id of the run.
        out: folder OUT.
        record: path of the record in the records' folder.
        calibration_key: hash of model, dtype and calibration set, equal for all runs that share statistics.
        saves_model: whether the run saves a model folder.
    """

    cell: Cell
    config: RunConfig
    run_id: str
    out: Path
    record: Path
    calibration_key: str
    saves_model: bool

    @property
    def is_done(self) -> bool:
        """True if the record states success and all files of the run are undamaged.

        Raises:
            CheckpointError: the file at the path of the record is not a record.
        """
        record = RunRecord.read(self.record)
        return (
            record is not None
            and record.succeeded
            and find_run_damage(record, self.out, model=self.saves_model, hashes=self.config.check_files) is None
        )


@dataclass(frozen=True)
class Outcome:
    """Outcome of a job.

    Attributes:
        name: done, failed, or busy (another process is executing the run).
        reason: why the run failed, or which process is executing it.
        seconds: duration.
    """

    name: str
    reason: str = ""
    seconds: float = 0.0


def prepare_jobs(cells: Iterable[Cell]) -> list[Job]:
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
        calibration_key = digest([prepared.identity["model"], prepared.identity["dtype"], pruning.get("calibration")])
        out = Path(config.paths.output_dir) / prepared.run_id
        record = Path(config.paths.records_dir) / f"{prepared.run_id}.json"
        saves_model = config.save.model and config.pruner.instance.prunes
        jobs.setdefault(prepared.run_id, Job(cell, config, prepared.run_id, out, record, calibration_key, saves_model))
    if problems:
        raise ConfigError(*problems)
    return list(jobs.values())


def job_state(job: Job) -> State:
    """Return the state of a job, read from its record and its folder OUT."""
    try:
        if job.is_done:
            repeat = RunRecord.read(job.out / "record.repeat.json")
            return State("done", f"its repeat failed: {error_line(repeat)}" if repeat is not None else "")
    except CheckpointError as error:
        return State("failed", str(error))
    return folder_state(job.out)


def do(request: RunConfig | Sequence[str], base_models: BaseModels) -> Outcome:
    """Execute a run in this process and return its outcome.

    No error is raised. The outcome holds its message, and the record holds the traceback.

    Args:
        request: checked configuration of the run, or the overrides of its command line.
        base_models: pool that keeps the base model between runs.
    """
    start = time.perf_counter()
    try:
        run(
            request if isinstance(request, RunConfig) else parse(compose(request)),
            multirun=True,
            base_models=base_models,
        )
    except BusyError as error:
        return Outcome("busy", str(error))
    except Exception as error:  # an error of one run must not stop the others
        log.debug("run failed", exc_info=error)
        kind = "" if isinstance(error, CfspError) else f"{type(error).__name__}: "
        return Outcome("failed", f"{kind}{_on_one_line(str(error))}", time.perf_counter() - start)
    return Outcome("done", "", time.perf_counter() - start)


def mark_failed(job: Job, reason: str) -> None:
    """Write the reason of failure into the record of a run whose process has died."""
    record = None
    with contextlib.suppress(CheckpointError):
        record = RunRecord.read(job.out / "record.json")
    record = record or RunRecord(job.run_id)  # the process died before or while it wrote the record
    if record.status != "success":
        record.error = {"type": "ProcessDied", "message": reason}
        record.write(job.out / "record.json")


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
