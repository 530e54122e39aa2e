"""The order in which the jobs of a sweep start, and what a worker sees of the machine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cfsp.launcher import launch
from cfsp.launcher.launch import Queue, _worker_variables
from cfsp.sweep.job import Outcome


def job(name: str, calibration: str, *, is_done: bool = False) -> SimpleNamespace:
    return SimpleNamespace(run_id=name, calibration_key=calibration, is_done=is_done)


def test_one_job_of_each_calibration_starts_first():
    queue = Queue([job("a1", "a"), job("a2", "a"), job("b1", "b"), job("a3", "a"), job("b2", "b")])
    assert [queue.take_next().run_id for _ in range(5)] == ["a1", "b1", "a2", "a3", "b2"]
    assert queue.take_next() is None


def test_a_job_that_another_sweep_executes_comes_back_later(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(launch.time, "monotonic", lambda: now[0])
    queue = Queue([job("a", "x"), job("b", "x")])
    first = queue.take_next()
    assert not queue.settle(first, Outcome("busy"))
    assert queue.take_next().run_id == "b"
    assert queue.take_next() is None
    now[0] += launch.POLL_SECONDS
    assert queue.take_next() is first
    first.is_done = True
    assert queue.settle(first, Outcome("busy"))
    assert not queue.waiting


@pytest.mark.parametrize("name", ["done", "failed"])
def test_a_job_that_ended_stays_ended(name):
    queue = Queue([job("a", "x")])
    assert queue.settle(queue.take_next(), Outcome(name))
    assert not queue.waiting


def test_workers_share_gpus_in_turn_and_otherwise_the_cores(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert [_worker_variables(n, 3)["CUDA_VISIBLE_DEVICES"] for n in range(3)] == ["2", "5", "2"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launch, "cores", lambda: 8)
    assert _worker_variables(0, 3) == {"OMP_NUM_THREADS": "2"}
    assert _worker_variables(0, 20) == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert _worker_variables(0, 3) == {}
