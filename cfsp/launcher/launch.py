"""Launchers for this machine: one run after the other in this process, or several processes."""

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

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    # Imported where they are used, for start-up time: tables and reports read the keys of this module without torch.
    from cfsp.sweep.job import Job, Outcome

#: Called with every job that is over.
Report = Callable[["Job", "Outcome"], None]
#: Seconds between two looks at runs that another sweep is at.
LOOK = 1.0
#: Seconds that an interrupted process may take to write its record.
_PATIENCE = 5.0


@component
class Sequential(Launcher):
    """Runs in this process, in order. The base model is loaded once."""

    def launch(self, jobs: Sequence[Job], report: Report) -> None:
        """Run all jobs and report how each ended."""
        from cfsp.pipeline.base_models import BaseModels
        from cfsp.sweep.job import do

        queue, bases = Queue(jobs), BaseModels(keep=True)
        while queue.waiting:
            job = queue.next()
            if job is None:
                time.sleep(LOOK)
                continue
            outcome = queue.elsewhere(job) or do(job.config, bases)
            if queue.ended(job, outcome):
                report(job, outcome)


@component
class Local(Launcher):
    """Runs in several processes of this machine.

    Each process takes a GPU in turn, or its share of the cores where there are no GPUs. A process that dies is
    replaced, and only its own run has failed.

    Attributes:
        processes: how many there are.
    """

    processes: Annotated[int, Field(ge=1)] = 2

    def launch(self, jobs: Sequence[Job], report: Report) -> None:
        """Run all jobs and report how each ended."""
        queue = Queue(jobs)
        workers = [_Worker(number, self.processes) for number in range(min(self.processes, len(jobs)))]
        try:
            while queue.waiting or any(worker.job for worker in workers):
                for worker in workers:
                    if worker.job is None and (job := queue.next()) is not None:
                        if (over := queue.elsewhere(job)) is not None:
                            report(job, over)
                        else:
                            worker.give(job)
                busy = [worker for worker in workers if worker.job]
                if not busy:
                    time.sleep(LOOK)
                for worker in _heard(busy):
                    job, outcome = worker.result()
                    if queue.ended(job, outcome):
                        report(job, outcome)
        finally:
            for worker in workers:
                worker.close()


class Queue:
    """Jobs that are not done, in the order in which they start.

    Jobs that calibrate for others come first. A job that needs what another one is calibrating comes after other work.
    Where there is no other work it starts, and waits for the statistics alone (their lease). A job that another sweep
    is at comes back until it is done or free.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        """Queue ``jobs``."""
        self.waiting = list(jobs)
        self._begun: set[str] = set()
        self._again: dict[str, float] = {}
        self._began = time.time()

    def elsewhere(self, job: Job) -> Outcome | None:
        """Return how another sweep has ended a job that came back; None where this sweep has to do it.

        A job that failed there since this sweep began is not tried again, because it would fail in the same way.
        """
        from cfsp.sweep.job import Outcome, state_of

        if job.run_id not in self._again:
            return None
        state, record = state_of(job), job.out / "record.json"
        if state.name == "failed" and record.is_file() and record.stat().st_mtime >= self._began:
            return Outcome("failed", state.reason)
        return None

    def next(self) -> Job | None:
        """Return the next job to start now; None where every job has to wait."""
        now = time.monotonic()
        ready = [job for job in self.waiting if self._again.get(job.run_id, 0) <= now]
        if not ready:
            return None
        first = next((job for job in ready if job.shares not in self._begun), ready[0])
        self._begun.add(first.shares)
        self.waiting.remove(first)
        return first

    def ended(self, job: Job, outcome: Outcome) -> bool:
        """Return whether a job is over. A job that another sweep is still at goes back into the queue."""
        if outcome.name != "busy" or job.is_done:
            return True
        self._again[job.run_id] = time.monotonic() + LOOK
        self.waiting.append(job)
        return False


class _Worker:
    """A process that does one job at a time. Where it dies, another one takes its place."""

    def __init__(self, number: int, of: int) -> None:
        self._number, self._of = number, of
        self.job: Job | None = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_serve, args=(theirs,), daemon=True)
        with environment(_shares(self._number, self._of)):
            self.process.start()
        theirs.close()

    def give(self, job: Job) -> None:
        """Start a job."""
        self.job = job
        with contextlib.suppress(OSError):  # it has died: result() says so
            self.connection.send(job.cell.overrides)

    def result(self) -> tuple[Job, Outcome]:
        """Return the job that has ended, and how it ended."""
        from cfsp.sweep.job import Outcome, mark_failed

        job, self.job = self.job, None
        assert job is not None
        try:
            return job, self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            reason = _death(self.process.exitcode)
            mark_failed(job, reason)
            self._start()
            return job, Outcome("failed", reason)

    def close(self) -> None:
        """End the process. A job that it is at is interrupted, and the next launch goes on with it."""
        self.connection.close()
        if self.job is not None:
            # Ctrl-C has reached the process too, or reaches it now. It then releases its leases and its semaphores.
            self.process.join(1)
            if self.process.is_alive() and self.process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.process.pid, signal.SIGINT)
                self.process.join(_PATIENCE)
            self.process.terminate()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()


def _serve(connection: Connection) -> None:
    import threading

    from tqdm import tqdm

    from cfsp.pipeline.base_models import BaseModels
    from cfsp.sweep.job import do
    from cfsp.system.logs import quiet

    quiet()
    tqdm.set_lock(threading.RLock())  # tqdm's own lock is a semaphore, which leaks when this process is ended
    bases = BaseModels(keep=True)
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            connection.send(do(connection.recv(), bases))


def _heard(workers: Sequence[_Worker]) -> list[_Worker]:
    ready: list[Any] = wait([worker.connection for worker in workers], timeout=LOOK) if workers else []
    return [worker for worker in workers if worker.connection in ready]


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        memory = " (often: out of memory; fewer launcher.processes or smaller batches)" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{memory}"
    return f"its process ended with exit code {code}"


def _shares(number: int, of: int) -> dict[str, str]:
    """Return the environment of a worker: its GPU, or its share of the cores where there are no GPUs."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = (
        [name for name in visible.split(",") if name] if visible else [str(n) for n in range(torch.cuda.device_count())]
    )
    if gpus:
        return {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]}
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, cores() // of))}


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for processes that are started inside."""
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
