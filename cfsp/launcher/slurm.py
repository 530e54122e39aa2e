"""Launcher for a Slurm cluster: the runs of a sweep are one array of jobs, which outlives the sweep command."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field

from cfsp.config.components import component
from cfsp.errors import ConfigError
from cfsp.launcher.cluster import Count, CountOrNone, Ended, Submitit, Submitted, Text
from cfsp.sweep.job import Job

log = logging.getLogger(__name__)

#: File in OUT that names the submitted job, for a later sweep command.
NOTE = ".submitted.json"
#: Seconds between two questions to Slurm; and seconds after which the result of a job that has left the queue is given
#: up. A shared file system may show it late.
ASK, GRACE = 10.0, 15.0
#: Slurm's names for the states of jobs that do not run again, with the way out where there is one.
ENDED = {
    "BOOT_FAIL": "",
    "CANCELLED": " (by scancel or an administrator)",
    "COMPLETED": "",
    "DEADLINE": "",
    "FAILED": "",
    "NODE_FAIL": " (its machine is gone)",
    "OUT_OF_MEMORY": " (raise launcher.mem_gb, or use smaller batches)",
    "PREEMPTED": "",
    "REVOKED": "",
    "TIMEOUT": " (raise launcher.timeout_min)",
}


def _must_be_one(value: int) -> int:
    if value != 1:
        raise ValueError("a run is one process on one machine; use 1")
    return value


One = Annotated[int, Field(strict=True), AfterValidator(_must_be_one)]


@component
class Slurm(Submitit):
    """Runs as one array of Slurm jobs. They outlive the sweep command, and the same command then waits for them.

    The keys are those of hydra-submitit-launcher, which are named after the options of sbatch.
    """

    option: ClassVar[str] = "slurm"
    executor: ClassVar[str] = "slurm"

    partition: Text | None = None
    cpus_per_task: Count | None = None
    mem_gb: Count | None = None
    account: Text | None = None
    qos: Text | None = None
    constraint: Text | None = None
    exclude: Text | None = None
    gres: Text | None = None
    gpus_per_task: Count | None = None
    cpus_per_gpu: Count | None = None
    mem_per_gpu: Text | None = None
    mem_per_cpu: Text | None = None
    nodes: One = 1
    tasks_per_node: One = 1
    name: Text = "cfsp"
    comment: Text | None = None
    setup: list[str] | None = None
    additional_parameters: dict[str, Any] = Field(default_factory=dict)
    max_num_timeout: CountOrNone = 0
    signal_delay_s: Count = 120

    def check(self) -> None:
        """See that submitit and Slurm's commands are installed.

        Raises:
            ConfigError: one of them is missing.
        """
        super().check()
        for name in ("sbatch", "srun", "squeue", "scontrol"):
            if shutil.which(name) is None:
                raise ConfigError(
                    f"launcher=slurm: there is no {name} on this machine; start the sweep where one submits to Slurm "
                    "(Debian: slurm-client), or use launcher=local"
                )

    def settings(self, places: int) -> dict[str, Any]:
        """Return the plugin's keys with their values, for ``places`` runs at a time."""
        values = super().settings(places)
        if self.cpus_per_task is not None:  # since Slurm 22.05 srun does not take it over from sbatch
            values["setup"] = [f"export SRUN_CPUS_PER_TASK={self.cpus_per_task}", *(self.setup or ())]
        return values

    def earlier(self, jobs: Sequence[Job]) -> list[Submitted]:
        """Return the runs whose notes name a job that is still in the queue."""
        import submitit

        notes = {job.run_id: note for job in jobs if (note := _note(job)) is not None}
        states = (_states() or {}) if notes else {}
        alive = {name for name, state in states.items() if state not in ENDED}
        return [
            Submitted(job, submitit.SlurmJob(note["folder"], note["id"]))
            for job in jobs
            if (note := notes.get(job.run_id)) is not None and note["id"] in alive
        ]

    def submitted(self, runs: Sequence[Submitted], folder: Path) -> None:
        """Note the job of each run in its folder, and print the name of the array."""
        for run in runs:
            run.job.out.mkdir(parents=True, exist_ok=True)
            note = {"folder": str(folder), "id": run.handle.job_id, "words": run.job.cell.overrides}
            (run.job.out / NOTE).write_text(json.dumps(note), encoding="utf-8")
        (name,) = _arrays([run.handle for run in runs])
        print(f"{len(runs)} runs submitted to Slurm, job {name}; what the jobs write: {folder}", flush=True)

    def watch(self) -> Ended:
        """Return a function that asks the queue."""
        return SlurmQueue()

    def room(self, places: int) -> int | None:
        """Return None: all jobs are submitted at once."""
        return None  # Slurm keeps them all, and lets as many run as the array allows

    def allow(self, places: int, handles: Sequence[Any]) -> None:
        """Set how many jobs of the arrays run at a time."""
        for name in _arrays([handle for handle in handles if "_" in handle.job_id]):
            # Slurm complains about jobs that are over, and does it for the others.
            _output_of("scontrol", "update", f"JobId={name}", f"ArrayTaskThrottle={places}", fine="already finished")

    def left(self, handles: Sequence[Any]) -> None:
        """Print how to end the jobs, which stay with Slurm."""
        if handles:
            print(f"the runs stay with Slurm; to end them: scancel {' '.join(_arrays(handles))}", flush=True)


class SlurmQueue:
    """Slurm's queue, asked for all jobs at once. Unlike sacct, squeue needs no accounting."""

    def __init__(self) -> None:
        """Start without having asked."""
        self._asked = float("-inf")
        self._states: Mapping[str, str] | None = None
        self._gone: dict[str, float] = {}

    def __call__(self, handle: Any) -> str | None:
        """Return why the job is over; None while it is not, or while Slurm does not answer."""
        now = time.monotonic()
        if now - self._asked >= ASK:
            self._states, self._asked = _states(), now
        state = None if self._states is None else self._states.get(handle.job_id, "")
        if state is None or (state and state not in ENDED):
            self._gone.pop(handle.job_id, None)
            return None
        if now - self._gone.setdefault(handle.job_id, now) < GRACE:
            return None
        return f"Slurm's job {handle.job_id} ended without a result: {state or 'gone'}{ENDED.get(state, '')}"


def _note(job: Job) -> dict[str, str] | None:
    """Return the note of the run's submission, where it was submitted with the same overrides."""
    try:
        note = json.loads((job.out / NOTE).read_text(encoding="utf-8"))
        return note if tuple(note["words"]) == job.cell.overrides else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _arrays(handles: Sequence[Any]) -> list[str]:
    return sorted({handle.job_id.partition("_")[0] for handle in handles})


def _states() -> Mapping[str, str] | None:
    """Return Slurm's state of each job of this user, recently ended ones too; None where Slurm does not answer."""
    user = f"--user={os.getuid()}"
    text = _output_of("squeue", "--noheader", "--array", "--states=all", user, "--format=%i %T")
    return None if text is None else dict(line.split(maxsplit=1) for line in text.splitlines() if " " in line.strip())


def _output_of(*command: str, fine: str | None = None) -> str | None:
    """Return the output of a Slurm command; None where it fails, which is logged unless it says ``fine``."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        message = " ".join(str(getattr(error, "stderr", None) or error).split())
        if fine is None or fine not in message:
            log.warning("%s: %s", " ".join(command), message)
        return None
