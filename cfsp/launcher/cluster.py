"""Launchers that use submitit: the common part of a cluster and of processes of this machine.

The keys of a launcher are those of hydra-submitit-launcher's configuration. The plugin's own launch() is not used,
because it waits for the jobs in their order and gives up at the first that failed.
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
from cfsp.launcher.launch import LOOK, Queue, Report, environment
from cfsp.pipeline.base_models import BaseModels
from cfsp.pipeline.run import LEASE
from cfsp.record.environment import cores
from cfsp.sweep.job import Job, Outcome, do, mark_failed
from cfsp.system.lease import holder

#: Tells why a submitit job without a result is over; None while it is not over.
Ended = Callable[[Any], str | None]
Count = Annotated[int, Field(ge=1, strict=True)]
CountOrNone = Annotated[int, Field(ge=0, strict=True)]
Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class Submitted:
    """A run that was submitted.

    Attributes:
        job: the run.
        handle: submitit's job that does it.
    """

    job: Job
    handle: Any


@component
class Submitit(Launcher):
    """Submits every run as a job of its own and waits for the results.

    Runs that calibrate for others come first. Until their plans are there, no more jobs run at a time than there are
    such runs, because a job that waits for another's statistics would hold a machine for nothing.

    Attributes:
        submitit_folder: where submitit keeps its files.
        timeout_min: minutes that a run may take.
        gpus: GPUs of each run.
        gpus_per_node: the same; give one of the two.
        stderr_to_stdout: write both streams of a job into one file.
        array_parallelism: how many jobs run at a time.
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
        """See that submitit is installed.

        Raises:
            ConfigError: it is not; says how to install it.
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
        """Submit the jobs that no earlier command has submitted, wait for all, and report how each ended.

        Raises:
            ConfigError: the jobs are refused.
        """
        flying = {submitted.job.run_id: submitted for submitted in self.earlier(jobs)}
        if flying:
            print(f"{len(flying)} runs were submitted before; waiting for them", flush=True)
        queue = Queue([job for job in jobs if job.run_id not in flying])
        first: dict[str, Job] = {}
        for job in [*(submitted.job for submitted in flying.values()), *queue.waiting]:
            first.setdefault(job.shares, job)
        places, ended = 0, self.watch()
        try:
            while queue.waiting or flying:
                unfinished = {*flying, *(job.run_id for job in queue.waiting)}
                calibrated = all(_is_planned(job) or job.run_id not in unfinished for job in first.values())
                before, places = places, min(self.array_parallelism, len(jobs) if calibrated else len(first))
                if flying and places != before:
                    self.allow(places, [submitted.handle for submitted in flying.values()])
                free = list(_free(queue, report, self.room(places - len(flying))))
                if free:
                    flying |= {submitted.job.run_id: submitted for submitted in self._submit(free, places)}
                for run_id, outcome in _over(flying, ended):
                    job = flying.pop(run_id).job
                    if queue.ended(job, outcome):
                        report(job, outcome)
                if queue.waiting or flying:
                    time.sleep(LOOK)
        except BaseException:
            self.left([submitted.handle for submitted in flying.values()])
            raise

    def _submit(self, jobs: Sequence[Job], places: int) -> list[Submitted]:
        # Ids of jobs come again (process ids; a Slurm that was set up anew), so each submission has a folder of its own
        # and never reads the result of an earlier job.
        folder = Path(self.submitit_folder) / f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
        commands = [job.cell.overrides for job in jobs]
        try:
            with environment(self.variables()):
                handles = self._executor(folder, places).map_array(Run(str(Path.cwd())), commands)
        except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
            raise ConfigError(f"launcher={self.option}: the runs were not submitted ({error})") from error
        submitted = [Submitted(job, handle) for job, handle in zip(jobs, handles, strict=True)]
        self.submitted(submitted, folder)
        return submitted

    def _executor(self, folder: Path, places: int) -> Any:
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
        from submitit import AutoExecutor

        shared = {field.name for field in fields(BaseQueueConf)}
        settings = {key: value for key, value in self.settings(places).items() if value is not None}
        creating = {f"{self.executor}_{key}": settings.pop(key) for key in ("max_num_timeout",) if key in settings}
        executor = AutoExecutor(folder=folder, cluster=self.executor, **creating)
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

    def earlier(self, jobs: Sequence[Job]) -> list[Submitted]:
        """Return the runs among ``jobs`` that an earlier command submitted and that are not over."""
        return []

    def submitted(self, runs: Sequence[Submitted], folder: Path) -> None:
        """Take note of runs that have just been submitted; ``folder``: where submitit keeps their files."""

    def watch(self) -> Ended:
        """Return the function that tells why a job without a result is over."""
        raise NotImplementedError

    def room(self, places: int) -> int | None:
        """Return how many jobs to submit where ``places`` are free; None for all."""
        return places

    def allow(self, places: int, handles: Sequence[Any]) -> None:
        """Let ``places`` of these jobs run at a time from now on."""

    def left(self, handles: Sequence[Any]) -> None:
        """Take leave of jobs that go on when the sweep command ends."""
        raise NotImplementedError


@component
class SubmititLocal(Submitit):
    """Runs in processes of this machine that submitit starts, to try what goes to Slurm.

    They end with the sweep command. Where that is killed, they go on, and the next command waits for them. ``gpus`` is
    how many GPUs each run sees, the same ones for all; None: it sees none.
    """

    option: ClassVar[str] = "submitit_local"
    executor: ClassVar[str] = "local"

    array_parallelism: Count = 2

    def settings(self, places: int) -> dict[str, Any]:
        """Return the plugin's keys. Processes of this machine have no array."""
        return {key: value for key, value in super().settings(places).items() if key != "array_parallelism"}

    def variables(self) -> Mapping[str, str]:
        """Return each job's share of the cores, unless the user has set one."""
        if "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, cores() // self.array_parallelism))}

    def watch(self) -> Ended:
        """Return a function that tells whether the process of a job has ended."""
        return lambda handle: f"process {handle.job_id} ended without a result" if handle.done() else None

    def left(self, handles: Sequence[Any]) -> None:
        """End the processes."""
        for handle in handles:
            handle.cancel()


class Run:
    """Callable that submitit sends to a job, with the overrides of a run's command line."""

    def __init__(self, folder: str) -> None:
        """Run in ``folder``, the working folder of the sweep command."""
        self.folder = folder

    def __call__(self, overrides: Sequence[str]) -> Outcome:
        """Run the job, whose command line has these overrides."""
        from cfsp.system.logs import quiet

        os.chdir(self.folder)
        quiet()
        return do(overrides, BaseModels())

    def checkpoint(self, overrides: Sequence[str]) -> Any:
        """Return the job that submitit starts again where the time was up and ``max_num_timeout`` allows it."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, overrides)


def _is_planned(job: Job) -> bool:
    """Return whether the run has its plan, which is written right after its statistics."""
    return (job.out / "plan.json").is_file()


def _free(queue: Queue, report: Report, room: int | None) -> Iterator[Job]:
    """Yield the next ``room`` jobs that no other process is at. A job whose run is busy would cost a place."""
    while (room is None or room > 0) and (job := queue.next()) is not None:
        who = holder(job.out / LEASE)
        if (over := queue.elsewhere(job)) is not None:
            report(job, over)
        elif who is None:
            room = None if room is None else room - 1
            yield job
        elif queue.ended(job, busy := Outcome("busy", f"{who} is at it")):
            report(job, busy)


def _over(flying: Mapping[str, Submitted], ended: Ended) -> list[tuple[str, Outcome]]:
    """Return the runs that are over, and how each ended."""
    over = []
    for run_id, submitted in flying.items():
        folder, result = submitted.handle.paths.folder, submitted.handle.paths.result_pickle
        if folder.is_dir():
            folder.chmod(folder.stat().st_mode)  # makes a network file system look again, as submitit does
        if result.exists():
            over.append((run_id, _outcome(submitted)))
        elif (reason := ended(submitted.handle)) is not None and not result.exists():
            over.append((run_id, Outcome("done") if submitted.job.is_done else _failed(submitted, reason)))
    return over


def _outcome(submitted: Submitted) -> Outcome:
    try:
        outcome: Outcome = submitted.handle.result()
    except Exception as error:  # whatever the job raised comes out here
        return _failed(submitted, f"job {submitted.handle.job_id}: {_cause(str(error))}")
    if outcome.reason.startswith("UncompletedJobError"):  # what submitit raises in a run whose time is up
        return _failed(submitted, "its time was up (raise launcher.timeout_min)")
    return outcome


def _failed(submitted: Submitted, reason: str) -> Outcome:
    written = submitted.handle.paths.stderr
    if written.is_file():
        reason = f"{reason}; see {os.path.relpath(written)}"
    mark_failed(submitted.job, reason)
    return Outcome("failed", reason)


def _cause(text: str) -> str:
    """Return the last line of the traceback in submitit's message about a job."""
    trace = text.rpartition("\n------")[0].strip() or text.strip()
    return trace.splitlines()[-1] if trace else "it failed"
