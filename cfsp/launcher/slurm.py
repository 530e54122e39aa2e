"""Launcher for a Slurm cluster: the runs of a sweep are one job array, which continues after the sweep command."""

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
from cfsp.launcher.cluster import Count, CountOrNone, EndReason, Submitit, Submitted, Text
from cfsp.sweep.job import Job

log = logging.getLogger(__name__)

#: File in OUT that names the submitted job, for a later sweep command.
NOTE = ".submitted.json"
#: Seconds between two calls of squeue.
POLL_SECONDS = 10.0
#: Seconds to wait for the result of a job that has left the queue. A shared file system may show the result late.
GRACE_SECONDS = 15.0
#: Slurm state of a job that does not run again -> explanation or way out for the message.
END_STATES = {
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


MustBeOne = Annotated[int, Field(strict=True), AfterValidator(_must_be_one)]


@component
class Slurm(Submitit):
    """Launcher that submits the runs as one array of Slurm jobs.

    The jobs continue after the sweep command has ended; the same command then waits for them.
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
    nodes: MustBeOne = 1
    tasks_per_node: MustBeOne = 1
    name: Text = "cfsp"
    comment: Text | None = None
    setup: list[str] | None = None
    additional_parameters: dict[str, Any] = Field(default_factory=dict)
    max_num_timeout: CountOrNone = 0
    signal_delay_s: Count = 120

    def check(self) -> None:
        """Check that submitit and the commands of Slurm are installed.

        Raises:
            ConfigError: submitit or a command is missing.
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
        if self.cpus_per_task is not None:  # since Slurm 22.05 srun does not inherit it from sbatch
            values["setup"] = [f"export SRUN_CPUS_PER_TASK={self.cpus_per_task}", *(self.setup or ())]
        return values

    def find_submitted(self, jobs: Sequence[Job]) -> list[Submitted]:
        """Return the runs whose submission note names a job that is still in the queue."""
        import submitit

        notes = {job.run_id: note for job in jobs if (note := _note(job)) is not None}
        states = (_states() or {}) if notes else {}
        queued = {name for name, state in states.items() if state not in END_STATES}
        return [
            Submitted(job, submitit.SlurmJob(note["folder"], note["id"]))
            for job in jobs
            if (note := notes.get(job.run_id)) is not None and note["id"] in queued
        ]

    def record_submission(self, runs: Sequence[Submitted], folder: Path) -> None:
        """Write the Slurm job of each run into its folder, and print the id of the array."""
        for run in runs:
            run.job.out.mkdir(parents=True, exist_ok=True)
            note = {"folder": str(folder), "id": run.handle.job_id, "words": run.job.cell.overrides}
            (run.job.out / NOTE).write_text(json.dumps(note), encoding="utf-8")
        (array_id,) = _array_ids([run.handle for run in runs])
        print(f"{len(runs)} runs submitted to Slurm, job {array_id}; what the jobs write: {folder}", flush=True)

    def end_reason_function(self) -> EndReason:
        """Return a function that looks the job up in the queue of Slurm."""
        return SlurmQueue()

    def submission_limit(self, places: int) -> int | None:
        """Return None: all jobs are submitted at once, and Slurm limits how many of the array run at a time."""
        return None

    def set_parallelism(self, places: int, handles: Sequence[Any]) -> None:
        """Set how many jobs of each array run at a time."""
        for array_id in _array_ids([handle for handle in handles if "_" in handle.job_id]):
            # Slurm reports an error for jobs that have ended, but changes the others.
            _run_command(
                "scontrol", "update", f"JobId={array_id}", f"ArrayTaskThrottle={places}", ignored="already finished"
            )

    def leave(self, handles: Sequence[Any]) -> None:
        """Print how to cancel the jobs, which stay in the queue of Slurm."""
        if handles:
            print(f"the runs stay with Slurm; to end them: scancel {' '.join(_array_ids(handles))}", flush=True)


class SlurmQueue:
    """State of all jobs in the queue of Slurm, from one call of squeue. Unlike sacct, squeue needs no accounting."""

    def __init__(self) -> None:
        """Start without any known state."""
        self._polled_at = float("-inf")
        self._states: Mapping[str, str] | None = None
        self._missing_since: dict[str, float] = {}

    def __call__(self, handle: Any) -> str | None:
        """Return why the job ended without a result; None while it has not ended or Slurm does not answer."""
        now = time.monotonic()
        if now - self._polled_at >= POLL_SECONDS:
            self._states, self._polled_at = _states(), now
        state = None if self._states is None else self._states.get(handle.job_id, "")
        if state is None or (state and state not in END_STATES):
            self._missing_since.pop(handle.job_id, None)
            return None
        if now - self._missing_since.setdefault(handle.job_id, now) < GRACE_SECONDS:
            return None
        return f"Slurm's job {handle.job_id} ended without a result: {state or 'gone'}{END_STATES.get(state, '')}"


def _note(job: Job) -> dict[str, str] | None:
    """Return the note of the submission if the run was submitted with the same overrides; otherwise None."""
    try:
        note = json.loads((job.out / NOTE).read_text(encoding="utf-8"))
        return note if tuple(note["words"]) == job.cell.overrides else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _array_ids(handles: Sequence[Any]) -> list[str]:
    return sorted({handle.job_id.partition("_")[0] for handle in handles})


def _states() -> Mapping[str, str] | None:
    """Return the Slurm state of each job of this user, of recently ended ones too; None if Slurm does not answer."""
    user = f"--user={os.getuid()}"
    text = _run_command("squeue", "--noheader", "--array", "--states=all", user, "--format=%i %T")
    return None if text is None else dict(line.split(maxsplit=1) for line in text.splitlines() if " " in line.strip())


def _run_command(*command: str, ignored: str | None = None) -> str | None:
    """Return the output of a Slurm command; None if it fails.

    A failure is logged unless its message contains ``ignored``.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        message = " ".join(str(getattr(error, "stderr", None) or error).split())
        if ignored is None or ignored not in message:
            log.warning("%s: %s", " ".join(command), message)
        return None
