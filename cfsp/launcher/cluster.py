"""Launchers that use submitit: the part common to all of them, and the launcher for processes of this machine.

The keys of a launcher are those of hydra-submitit-launcher's configuration. The plugin's own launch() is not used,
because it waits for the jobs in their order and stops at the first failure.
"""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from cfsp.config.components import component
from cfsp.config.contracts import Launcher
from cfsp.errors import ConfigError
from cfsp.launcher.launch import POLL_SECONDS, Queue, Report, set_environment
from cfsp.pipeline.base_models import BaseModels
from cfsp.pipeline.run import LEASE
from cfsp.record.environment import cores
from cfsp.sweep.job import Job, Outcome, do, mark_failed
from cfsp.system.lease import holder
from cfsp.system.logs import quiet

#: Function that returns why a submitit job ended without a result; None while the job may still give one.
EndReason = Callable[[Any], str | None]
Count = Annotated[int, Field(ge=1, strict=True)]
CountOrNone = Annotated[int, Field(ge=0, strict=True)]
Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class Submitted:
    """Run that was submitted to submitit.

    Attributes:
        job: the run.
        handle: the submitit job that executes it.
    """

    job: Job
    handle: Any


@component
class Submitit(Launcher):
    """Launcher that submits every run as a separate submitit job and waits for the results.

    The first run of each calibration is submitted before runs that share its statistics. Until all these first runs
    have a plan, no more jobs run at a time than there are first runs, because a job that waits for the statistics of
    another job would occupy a machine without working.

    Attributes:
        submitit_folder: folder for the files of submitit.
        timeout_min: time limit of a run, in minutes.
        gpus: number of GPUs of each run.
        gpus_per_node: another name of ``gpus``; only one of the two may be set.
        stderr_to_stdout: write both streams of a job into one file.
        array_parallelism: largest number of jobs that run at a time.
    """

    option: ClassVar[str]
    executor: ClassVar[str]

    submitit_folder: Text = "outputs/submitit"
    timeout_min: Count = 60
    gpus: CountOrNone | None = None
    gpus_per_node: CountOrNone | None = None
    stderr_to_stdout: bool = False
    array_parallelism: Count = 256

    def __post_init__(self) -> None:
        if self.gpus is not None and self.gpus_per_node is not None:
            raise ValueError("launcher.gpus and launcher.gpus_per_node are the same; give one of them")

    def check(self) -> None:
        """Check that submitit is installed.

        Raises:
            ConfigError: submitit is missing; the message says how to install it.
        """
        try:
            import hydra_plugins.hydra_submitit_launcher.config  # noqa: F401
            import submitit  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"launcher={self.option} needs hydra-submitit-launcher, and {error.name} is not installed; "
                'pip install "cfsp[slurm]"'
            ) from error

    def launch(self, jobs: Sequence[Job], report: Report) -> None:
        """Submit the jobs that no earlier command submitted, wait for all, and report the outcome of each.

        Raises:
            ConfigError: submitit or Slurm refuses the jobs.
        """
        running = {submitted.job.run_id: submitted for submitted in self.find_submitted(jobs)}
        if running:
            print(f"{len(running)} runs were submitted before; waiting for them", flush=True)
        queue = Queue([job for job in jobs if job.run_id not in running])
        first_jobs: dict[str, Job] = {}
        for job in [*(submitted.job for submitted in running.values()), *queue.waiting]:
            first_jobs.setdefault(job.calibration_key, job)
        places, end_reason = 0, self.end_reason_function()
        try:
            while queue.waiting or running:
                unfinished = {*running, *(job.run_id for job in queue.waiting)}
                all_planned = all(_is_planned(job) or job.run_id not in unfinished for job in first_jobs.values())
                before, places = places, min(self.array_parallelism, len(jobs) if all_planned else len(first_jobs))
                if running and places != before:
                    self.set_parallelism(places, [submitted.handle for submitted in running.values()])
                startable = list(_startable_jobs(queue, report, self.submission_limit(places - len(running))))
                if startable:
                    running |= {submitted.job.run_id: submitted for submitted in self._submit(startable, places)}
                for run_id, outcome in _ended_runs(running, end_reason):
                    job = running.pop(run_id).job
                    if queue.settle(job, outcome):
                        report(job, outcome)
                if queue.waiting or running:
                    time.sleep(POLL_SECONDS)
        except BaseException:
            self.leave([submitted.handle for submitted in running.values()])
            raise

    def _submit(self, jobs: Sequence[Job], places: int) -> list[Submitted]:
        # Job ids repeat (process ids, or a Slurm that was set up again), so each submission has its own folder. Then it
        # cannot read the result of an earlier job.
        folder = Path(self.submitit_folder) / f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
        commands = [job.cell.overrides for job in jobs]
        try:
            with set_environment(self.variables()):
                handles = self._executor(folder, places).map_array(Run(str(Path.cwd())), commands)
        except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
            raise ConfigError(f"launcher={self.option}: the runs were not submitted ({error})") from error
        submitted = [Submitted(job, handle) for job, handle in zip(jobs, handles, strict=True)]
        self.record_submission(submitted, folder)
        return submitted

    def _executor(self, folder: Path, places: int) -> Any:
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
        from submitit import AutoExecutor

        shared = {field.name for field in fields(BaseQueueConf)}
        settings = {key: value for key, value in self.settings(places).items() if value is not None}
        constructor_settings = {
            f"{self.executor}_{key}": settings.pop(key) for key in ("max_num_timeout",) if key in settings
        }
        executor = AutoExecutor(folder=folder, cluster=self.executor, **constructor_settings)
        names = {key: key if key in shared else f"{self.executor}_{key}" for key in settings}
        executor.update_parameters(**{names[key]: value for key, value in settings.items()})
        return executor

    def settings(self, places: int) -> dict[str, Any]:
        """Return the plugin's keys with their values, for ``places`` runs at a time."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        gpus = values.pop("gpus")
        del values["submitit_folder"]
        return {**values, "array_parallelism": places, **({} if gpus is None else {"gpus_per_node": gpus})}

    def variables(self) -> Mapping[str, str]:
        """Return the environment variables of the jobs."""
        return {}

    def find_submitted(self, jobs: Sequence[Job]) -> list[Submitted]:
        """Return the runs among ``jobs`` that an earlier command submitted and that have not ended."""
        return []

    def record_submission(self, runs: Sequence[Submitted], folder: Path) -> None:
        """Record runs that have just been submitted.

        Args:
            runs: the runs.
            folder: folder in which submitit keeps their files.
        """

    def end_reason_function(self) -> EndReason:
        """Return the function that says why a job ended without a result."""
        raise NotImplementedError

    def submission_limit(self, places: int) -> int | None:
        """Return how many jobs may be submitted if ``places`` more can run; None: all of them."""
        return places

    def set_parallelism(self, places: int, handles: Sequence[Any]) -> None:
        """Set how many of these jobs run at a time from now on."""

    def leave(self, handles: Sequence[Any]) -> None:
        """Handle jobs that are still running when the sweep command ends."""
        raise NotImplementedError


@component
class SubmititLocal(Submitit):
    """Launcher that executes the runs in processes of this machine through submitit, to test a sweep before Slurm.

    The processes end with the sweep command. If the command is killed, they continue, and the next command waits for
    them. ``gpus`` is the number of GPUs that every run sees, the same ones for all runs; None: no GPU.
    """

    option: ClassVar[str] = "submitit_local"
    executor: ClassVar[str] = "local"

    array_parallelism: Count = 2

    def settings(self, places: int) -> dict[str, Any]:
        """Return the plugin's keys without ``array_parallelism``, because local processes are not an array."""
        return {key: value for key, value in super().settings(places).items() if key != "array_parallelism"}

    def variables(self) -> Mapping[str, str]:
        """Return the number of threads of each job: its share of the cores, unless OMP_NUM_THREADS is set."""
        if "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, cores() // self.array_parallelism))}

    def end_reason_function(self) -> EndReason:
        """Return a function that says whether the process of a job ended without a result."""
        return lambda handle: f"process {handle.job_id} ended without a result" if handle.done() else None

    def leave(self, handles: Sequence[Any]) -> None:
        """End the processes."""
        for handle in handles:
            handle.cancel()


class Run:
    """Callable that submitit sends to a job, with the overrides of a run's command line."""

    def __init__(self, folder: str) -> None:
        """Set the working folder of the sweep command, in which the job runs."""
        self.folder = folder

    def __call__(self, overrides: Sequence[str]) -> Outcome:
        """Execute the run with these overrides and return its outcome."""
        os.chdir(self.folder)
        quiet()
        return do(overrides, BaseModels())

    def checkpoint(self, overrides: Sequence[str]) -> Any:
        """Return the job that submitit submits again after a timeout, if ``max_num_timeout`` allows it."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, overrides)


def _is_planned(job: Job) -> bool:
    """Return whether the run has its plan, which is written right after its statistics."""
    return (job.out / "plan.json").is_file()


def _startable_jobs(queue: Queue, report: Report, limit: int | None) -> Iterator[Job]:
    """Yield the next ``limit`` jobs that no other process is executing; None: all of them.

    A job whose run is busy is not submitted, because it would occupy a place without working.
    """
    while (limit is None or limit > 0) and (job := queue.take_next()) is not None:
        owner = holder(job.out / LEASE)
        if (outcome := queue.outcome_elsewhere(job)) is not None:
            report(job, outcome)
        elif owner is None:
            limit = None if limit is None else limit - 1
            yield job
        elif queue.settle(job, busy := Outcome("busy", f"{owner} is executing this run")):
            report(job, busy)


def _ended_runs(running: Mapping[str, Submitted], end_reason: EndReason) -> list[tuple[str, Outcome]]:
    """Return the id and the outcome of each run that has ended."""
    ended = []
    for run_id, submitted in running.items():
        folder, result = submitted.handle.paths.folder, submitted.handle.paths.result_pickle
        if folder.is_dir():
            folder.chmod(folder.stat().st_mode)  # refreshes the listing on a network file system, as submitit does
        if result.exists():
            ended.append((run_id, _read_outcome(submitted)))
        elif (reason := end_reason(submitted.handle)) is not None and not result.exists():
            ended.append((run_id, Outcome("done") if submitted.job.is_done else _failed_outcome(submitted, reason)))
    return ended


def _read_outcome(submitted: Submitted) -> Outcome:
    try:
        outcome: Outcome = submitted.handle.result()
    except Exception as error:  # submitit raises whatever the job raised
        return _failed_outcome(submitted, f"job {submitted.handle.job_id}: {_cause(str(error))}")
    if outcome.reason.startswith("UncompletedJobError"):  # submitit raises it in a run that reached its time limit
        return _failed_outcome(submitted, "its time was up (raise launcher.timeout_min)")
    return outcome


def _failed_outcome(submitted: Submitted, reason: str) -> Outcome:
    error_log = submitted.handle.paths.stderr
    if error_log.is_file():
        reason = f"{reason}; see {os.path.relpath(error_log)}"
    mark_failed(submitted.job, reason)
    return Outcome("failed", reason)


def _cause(text: str) -> str:
    """Return the last line of the traceback in submitit's message about a job."""
    trace = text.rpartition("\n------")[0].strip() or text.strip()
    return trace.splitlines()[-1] if trace else "it failed"
