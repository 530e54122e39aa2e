"""Launching the runs of a sweep through submitit: what a cluster and processes of this machine have in common.

The keys of a launcher here are those of hydra-submitit-launcher's configuration. The plugin's own launch() is not used:
it waits for the jobs in their order and gives up at the first that failed.
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

#: Why a job of submitit is over that left no result; None while it is not over.
Ended = Callable[[Any], str | None]
Count = Annotated[int, Field(ge=1, strict=True)]
CountOrNone = Annotated[int, Field(ge=0, strict=True)]
Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class Submitted:
    """A run of the sweep and submitit's job that does it."""

    job: Job
    handle: Any


@component
class Submitit(Launcher):
    """Submits every run as a job of its own and waits for the results.

    Those runs come first that calibrate what others share, and until their plans are there, no more run at a time than
    there are such: a run that only waited for another's statistics would hold a machine for nothing.
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
        """Whether the packages are here.

        Raises:
            ConfigError: how to install them.
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
        """Submit what no earlier command has submitted, wait for all, and say how each ended.

        Raises:
            ConfigError: the jobs are refused.
        """
        flying = {one.job.run_id: one for one in self.earlier(jobs)}
        if flying:
            print(f"{len(flying)} runs were submitted before; waiting for them", flush=True)
        queue = Queue([job for job in jobs if job.run_id not in flying])
        first: dict[str, Job] = {}
        for job in [*(one.job for one in flying.values()), *queue.waiting]:
            first.setdefault(job.shares, job)
        places, ended = 0, self.watch()
        try:
            while queue.waiting or flying:
                unfinished = {*flying, *(job.run_id for job in queue.waiting)}
                calibrated = all(_is_planned(job) or job.run_id not in unfinished for job in first.values())
                before, places = places, min(self.array_parallelism, len(jobs) if calibrated else len(first))
                if flying and places != before:
                    self.allow(places, [one.handle for one in flying.values()])
                free = list(_free(queue, report, self.room(places - len(flying))))
                if free:
                    flying |= {one.job.run_id: one for one in self._submit(free, places)}
                for run_id, outcome in _over(flying, ended):
                    job = flying.pop(run_id).job
                    if queue.ended(job, outcome):
                        report(job, outcome)
                if queue.waiting or flying:
                    time.sleep(LOOK)
        except BaseException:
            self.left([one.handle for one in flying.values()])
            raise

    def _submit(self, jobs: Sequence[Job], places: int) -> list[Submitted]:
        # Ids come again (of processes; of a Slurm that was set up anew): never read what another job left under mine.
        folder = Path(self.submitit_folder) / f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
        words = [job.cell.words for job in jobs]
        try:
            with environment(self.variables()):
                handles = self._executor(folder, places).map_array(Run(str(Path.cwd())), words)
        except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
            raise ConfigError(f"launcher={self.option}: the runs were not submitted ({error})") from error
        submitted = [Submitted(job, handle) for job, handle in zip(jobs, handles, strict=True)]
        self.submitted(submitted, folder)
        return submitted

    def _executor(self, folder: Path, places: int) -> Any:
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
        from submitit import AutoExecutor

        shared = {field.name for field in fields(BaseQueueConf)}
        given = {key: value for key, value in self.settings(places).items() if value is not None}
        creating = {f"{self.executor}_{key}": given.pop(key) for key in ("max_num_timeout",) if key in given}
        executor = AutoExecutor(folder=folder, cluster=self.executor, **creating)
        names = {key: key if key in shared else f"{self.executor}_{key}" for key in given}
        executor.update_parameters(**{names[key]: value for key, value in given.items()})
        return executor

    def settings(self, places: int) -> dict[str, Any]:
        """The plugin's keys with their values, for ``places`` runs at a time."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        gpus = values.pop("gpus")
        del values["submitit_folder"]
        return {**values, "array_parallelism": places, **({} if gpus is None else {"gpus_per_node": gpus})}

    def variables(self) -> Mapping[str, str]:
        """What is set in the environment of the jobs."""
        return {}

    def earlier(self, jobs: Sequence[Job]) -> list[Submitted]:
        """What an earlier command submitted of these, and is not over."""
        return []

    def submitted(self, runs: Sequence[Submitted], folder: Path) -> None:
        """Hear of what has been submitted; ``folder``: where submitit keeps its files."""

    def watch(self) -> Ended:
        """What tells that a job is over which left no result."""
        raise NotImplementedError

    def room(self, places: int) -> int | None:
        """How many to submit where ``places`` are free; None: all there are."""
        return places

    def allow(self, places: int, handles: Sequence[Any]) -> None:
        """Let so many of these run at a time from now on."""

    def left(self, handles: Sequence[Any]) -> None:
        """The sweep command ends before these have."""
        raise NotImplementedError


@component
class SubmititLocal(Submitit):
    """Processes of this machine that submitit starts: what goes to Slurm, without one.

    They end with the sweep command, unless that is killed: then the next one waits for what they are at.
    ``gpus``: how many GPUs each run sees, the same ones for all; None: it sees none.
    """

    option: ClassVar[str] = "submitit_local"
    executor: ClassVar[str] = "local"

    array_parallelism: Count = 2

    def settings(self, places: int) -> dict[str, Any]:
        return {key: value for key, value in super().settings(places).items() if key != "array_parallelism"}

    def variables(self) -> Mapping[str, str]:
        if "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, cores() // self.array_parallelism))}

    def watch(self) -> Ended:
        return lambda handle: f"process {handle.job_id} ended without a result" if handle.done() else None

    def left(self, handles: Sequence[Any]) -> None:
        for handle in handles:
            handle.cancel()


class Run:
    """What travels to a job, with the words of a run's command line; ``folder``: where the sweep command was given."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, words: Sequence[str]) -> Outcome:
        from cfsp.system.logs import quiet

        os.chdir(self.folder)
        quiet()
        return do(words, BaseModels())

    def checkpoint(self, words: Sequence[str]) -> Any:
        """What submitit has Slurm start again where the time was up and ``max_num_timeout`` allows it."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, words)


def _is_planned(job: Job) -> bool:
    """The plan is written right after the statistics it was made from."""
    return (job.out / "plan.json").is_file()


def _free(queue: Queue, report: Report, room: int | None) -> Iterator[Job]:
    """The next ``room`` jobs that no other process is at: one that only found its run busy would cost a place."""
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
    found = []
    for run_id, one in flying.items():
        folder, result = one.handle.paths.folder, one.handle.paths.result_pickle
        if folder.is_dir():
            folder.chmod(folder.stat().st_mode)  # makes a network file system look again, as submitit does
        if result.exists():
            found.append((run_id, _outcome(one)))
        elif (reason := ended(one.handle)) is not None and not result.exists():
            found.append((run_id, Outcome("done") if one.job.is_done else _failed(one, reason)))
    return found


def _outcome(one: Submitted) -> Outcome:
    try:
        outcome: Outcome = one.handle.result()
    except Exception as error:  # whatever the job raised comes out here
        return _failed(one, f"job {one.handle.job_id}: {_cause(str(error))}")
    if outcome.reason.startswith("UncompletedJobError"):  # what submitit raises in a run whose time is up
        return _failed(one, "its time was up (raise launcher.timeout_min)")
    return outcome


def _failed(one: Submitted, reason: str) -> Outcome:
    written = one.handle.paths.stderr
    if written.is_file():
        reason = f"{reason}; see {os.path.relpath(written)}"
    mark_failed(one.job, reason)
    return Outcome("failed", reason)


def _cause(text: str) -> str:
    """The last line of the traceback in submitit's message about a job."""
    trace = text.rpartition("\n------")[0].strip() or text.strip()
    return trace.splitlines()[-1] if trace else "it failed"
