"""Launching the runs of a sweep: one after the other in this process, or by several processes of this machine."""

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

    # Imported where they are used: tables and reports read this module's keys, and need nothing that computes.
    from cfsp.sweep.job import Job, Outcome

#: Told of every job that is over.
Report = Callable[["Job", "Outcome"], None]
#: Seconds between two looks at runs that another sweep is at.
LOOK = 1.0
#: Seconds for a process that was interrupted to write its record.
_PATIENCE = 5.0


@component
class Sequential(Launcher):
    """In this process, in order; the base model is loaded once."""

    def launch(self, jobs: Sequence[Job], report: Report) -> None:
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
    """``processes`` processes; each takes a GPU of its own where there are any, in turn, else its share of the cores.

    A process that dies is replaced; its run has failed, no other.
    """

    processes: Annotated[int, Field(ge=1)] = 2

    def launch(self, jobs: Sequence[Job], report: Report) -> None:
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
    """The jobs that are not done, those first that calibrate what others share.

    A job that needs what another is calibrating comes later where there is other work; where there is none it starts,
    and waits for the statistics alone (their lease). One that another sweep is at comes back until it is done or free.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.waiting = list(jobs)
        self._begun: set[str] = set()
        self._again: dict[str, float] = {}
        self._began = time.time()

    def elsewhere(self, job: Job) -> Outcome | None:
        """How another sweep has ended a job that came back; None where it is this one's to do.

        What failed there since this sweep began is not tried again: it would fail in the same way.
        """
        from cfsp.sweep.job import Outcome, state_of

        if job.run_id not in self._again:
            return None
        state, record = state_of(job), job.out / "record.json"
        if state.name == "failed" and record.is_file() and record.stat().st_mtime >= self._began:
            return Outcome("failed", state.reason)
        return None

    def next(self) -> Job | None:
        """The next job to start now; None where all that wait have to."""
        now = time.monotonic()
        ready = [job for job in self.waiting if self._again.get(job.run_id, 0) <= now]
        if not ready:
            return None
        first = next((job for job in ready if job.shares not in self._begun), ready[0])
        self._begun.add(first.shares)
        self.waiting.remove(first)
        return first

    def ended(self, job: Job, outcome: Outcome) -> bool:
        """Whether it is over; a job that another sweep is still at comes back."""
        if outcome.name != "busy" or job.is_done:
            return True
        self._again[job.run_id] = time.monotonic() + LOOK
        self.waiting.append(job)
        return False


class _Worker:
    """A process that does one job at a time, and its successor where it dies."""

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
            self.connection.send(job.cell.words)

    def result(self) -> tuple[Job, Outcome]:
        """The job that has ended, and how."""
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
        """Let it go; at work it is ended, which the next launch takes up."""
        self.connection.close()
        if self.job is not None:
            # Ctrl-C has reached it too, or reaches it now: ended so, it gives back what it holds, its semaphores too.
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
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which nobody frees when this process is ended
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
    """The environment of a worker: its GPU; without GPUs its share of the cores."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [name for name in given.split(",") if name] if given else [str(n) for n in range(torch.cuda.device_count())]
    if gpus:
        return {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]}
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, cores() // of))}


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """These variables inside, for processes that are started there."""
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
