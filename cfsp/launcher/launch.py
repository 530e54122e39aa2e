"""Launchers for this machine: runs in this process one after the other, or in several processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from cfsp.config.components import component
from cfsp.config.contracts import Launcher
from cfsp.record.environment import cores
from cfsp.system.logs import quiet

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    # Imported where they are used, for start-up time: tables and reports read the keys of this module without torch.
    from cfsp.sweep.job import Job, Outcome

#: Function that a launcher calls with every job that has ended.
Report = Callable[["Job", "Outcome"], None]
#: Seconds between two checks of runs that another sweep is executing.
POLL_SECONDS = 1.0
#: Seconds that an interrupted process may take to write its record.
_INTERRUPT_SECONDS = 5.0


@component
class Sequential(Launcher):
    """Launcher that executes the runs in this process, in order. The base model is loaded once."""

    def launch(self, jobs: Sequence[Job], report: Report) -> None:
        """Run all jobs and report the outcome of each."""
        # Start-up time: loads numpy, safetensors, torch.
        from cfsp.pipeline.base_models import BaseModels
        from cfsp.sweep.job import do

        queue, base_models = Queue(jobs), BaseModels(keep=True)
        while queue.waiting:
            job = queue.take_next()
            if job is None:
                time.sleep(POLL_SECONDS)
                continue
            outcome = queue.outcome_elsewhere(job) or do(job.config, base_models)
            if queue.settle(job, outcome):
                report(job, outcome)


@component
class Local(Launcher):
    """Launcher that executes the runs in several processes of this machine.

    GPUs are assigned to the processes in turn. Without GPUs each process gets an equal share of the cores. A process
    that dies is replaced, and only its own run fails.

    Attributes:
        processes: number of processes.
    """

    processes: Annotated[int, Field(ge=1)] = 2

    def launch(self, jobs: Sequence[Job], report: Report) -> None:
        """Run all jobs and report the outcome of each."""
        queue = Queue(jobs)
        workers = [_Worker(number, self.processes) for number in range(min(self.processes, len(jobs)))]
        try:
            while queue.waiting or any(worker.job for worker in workers):
                for worker in workers:
                    if worker.job is None and (job := queue.take_next()) is not None:
                        if (outcome := queue.outcome_elsewhere(job)) is not None:
                            report(job, outcome)
                        else:
                            worker.start_job(job)
                busy = [worker for worker in workers if worker.job]
                if not busy:
                    time.sleep(POLL_SECONDS)
                for worker in _workers_with_result(busy):
                    job, outcome = worker.result()
                    if queue.settle(job, outcome):
                        report(job, outcome)
        finally:
            for worker in workers:
                worker.close()


class Queue:
    """Jobs that have not ended, in the order in which they start.

    The first job of each calibration starts before jobs that share its statistics, so that the statistics are computed
    once. If only such jobs remain, they start too and wait for the lease of the statistics. A job that another sweep is
    executing returns to the queue until that sweep has finished or released it.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        """Queue ``jobs``."""
        self.waiting = list(jobs)
        self._started_calibrations: set[str] = set()
        self._retry_times: dict[str, float] = {}
        self._start_time = time.time()

    def outcome_elsewhere(self, job: Job) -> Outcome | None:
        """Return the outcome of a requeued job that another sweep has finished; None if this sweep must execute it.

        A job that failed in the other sweep since this sweep began is not repeated: it would fail in the same way.
        """
        # Start-up time: loads numpy, safetensors, torch.
        from cfsp.sweep.job import Outcome, job_state

        if job.run_id not in self._retry_times:
            return None
        state, record = job_state(job), job.out / "record.json"
        if state.name == "failed" and record.is_file() and record.stat().st_mtime >= self._start_time:
            return Outcome("failed", state.reason)
        return None

    def take_next(self) -> Job | None:
        """Remove and return the next job to start; None if every job has to wait."""
        now = time.monotonic()
        ready = [job for job in self.waiting if self._retry_times.get(job.run_id, 0) <= now]
        if not ready:
            return None
        first = next((job for job in ready if job.calibration_key not in self._started_calibrations), ready[0])
        self._started_calibrations.add(first.calibration_key)
        self.waiting.remove(first)
        return first

    def settle(self, job: Job, outcome: Outcome) -> bool:
        """Return whether the job has ended; otherwise another sweep is executing it, and it returns to the queue."""
        if outcome.name != "busy" or job.is_done:
            return True
        self._retry_times[job.run_id] = time.monotonic() + POLL_SECONDS
        self.waiting.append(job)
        return False


class _Worker:
    """Process that executes one job at a time; a process that dies is replaced by a new one."""

    def __init__(self, number: int, count: int) -> None:
        self._number, self._count = number, count
        self.job: Job | None = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.connection, child_end = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_serve, args=(child_end,), daemon=True)
        with set_environment(_worker_variables(self._number, self._count)):
            self.process.start()
        child_end.close()

    def start_job(self, job: Job) -> None:
        """Send a job to the process, which starts it."""
        self.job = job
        with contextlib.suppress(OSError):  # the process has died, which result() reports
            self.connection.send(job.cell.overrides)

    def result(self) -> tuple[Job, Outcome]:
        """Return the job that has ended and its outcome. The job of a process that died has failed."""
        # Start-up time: loads numpy, safetensors, torch.
        from cfsp.sweep.job import Outcome, mark_failed

        job, self.job = self.job, None
        assert job is not None
        try:
            return job, self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            reason = _death_reason(self.process.exitcode)
            mark_failed(job, reason)
            self._start()
            return job, Outcome("failed", reason)

    def close(self) -> None:
        """End the process. Its job is interrupted, and the next launch resumes it."""
        self.connection.close()
        if self.job is not None:
            # The process receives Ctrl-C too, or gets SIGINT here, so that it releases its leases and semaphores.
            self.process.join(1)
            if self.process.is_alive() and self.process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.process.pid, signal.SIGINT)
                self.process.join(_INTERRUPT_SECONDS)
            self.process.terminate()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()


def _serve(connection: Connection) -> None:
    import threading

    from tqdm import tqdm

    # Start-up time: loads numpy, safetensors, torch.
    from cfsp.pipeline.base_models import BaseModels
    from cfsp.sweep.job import do

    quiet()
    tqdm.set_lock(threading.RLock())  # tqdm's own lock is a semaphore, which leaks when this process is ended
    base_models = BaseModels(keep=True)
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            connection.send(do(connection.recv(), base_models))


def _workers_with_result(workers: Sequence[_Worker]) -> list[_Worker]:
    ready: list[Any] = wait([worker.connection for worker in workers], timeout=POLL_SECONDS) if workers else []
    return [worker for worker in workers if worker.connection in ready]


def _death_reason(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        memory = " (often: out of memory; fewer launcher.processes or smaller batches)" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{memory}"
    return f"its process ended with exit code {code}"


def _worker_variables(number: int, count: int) -> dict[str, str]:
    """Return the environment variables of a worker: its GPU, or without GPUs its share of the cores.

    Args:
        number: index of the worker, from 0.
        count: number of workers.
    """
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = (
        [name for name in visible.split(",") if name] if visible else [str(n) for n in range(torch.cuda.device_count())]
    )
    if gpus:
        return {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]}
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, cores() // count))}


@contextlib.contextmanager
def set_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for processes that are started inside the context, and restore them afterwards."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
