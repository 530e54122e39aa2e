"""Free memory where control groups limit it, on trees of files like those that Linux shows."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from cfsp.architecture.views import resolve
from cfsp.calibration.batching import batch_size
from cfsp.system import memory
from tests.helpers.tiny import tiny_model

CPU, GB = torch.device("cpu"), 10**9


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Files of a machine with 64 GB available; called with the process's groups and the content of files in them."""
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_MEMBERSHIP", tmp_path / "self")
    (tmp_path / "meminfo").write_text(f"MemTotal: {128 * GB // 1024} kB\nMemAvailable: {64 * GB // 1024} kB\n")

    def write(membership: str | None, files: dict[str, object]) -> None:
        if membership is not None:
            (tmp_path / "self").write_text(membership)
        for name, content in files.items():
            file: Path = tmp_path / "cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{content}\n")

    return write


def test_without_control_groups_the_memory_of_the_machine_counts(system) -> None:
    system(None, {})
    assert memory.available(CPU) == pytest.approx(64 * GB, abs=1024)
    assert memory.capacity(CPU) == pytest.approx(128 * GB, abs=1024)


def test_the_control_group_of_the_process_and_its_parents_limit_memory(system) -> None:
    system(
        "0::/user.slice/job\n",
        {
            "user.slice/memory.max": 20 * GB,
            "user.slice/memory.current": 5 * GB,
            "user.slice/job/memory.max": "max",
            "user.slice/job/memory.current": 1 * GB,
            "other/memory.max": 1 * GB,
            "other/memory.current": 0,
        },
    )
    assert memory.available(CPU) == 15 * GB
    assert memory.capacity(CPU) == 20 * GB
    system(None, {"user.slice/job/memory.max": 9 * GB, "user.slice/job/memory.stat": f"anon 7\nactive_file {2 * GB}"})
    assert memory.available(CPU) == 10 * GB, "what files occupy is given back on demand"
    system(None, {"user.slice/job/memory.current": 12 * GB})
    assert memory.available(CPU) == 0


def test_the_batch_size_does_not_depend_on_the_momentary_free_memory(system) -> None:
    """A killed calibration is found under its batch size, so the rerun must come to the same one."""
    view = resolve(tiny_model(width=64))
    asked = partial(batch_size, "auto", view, 256)
    system("0::/\n", {"memory.max": 2 * GB, "memory.current": 0})
    whole = asked()
    assert whole == 8, "2048 tokens at a time"
    system(None, {"memory.current": 2 * GB - 10**5})
    assert asked() == whole
    weights = sum(parameter.nbytes for parameter in view.model.parameters())
    per_sequence = 4 * 256 * (6 * view.model.get_input_embeddings().weight.shape[1] + 3 * 64)
    system(None, {"memory.max": weights + 2 * 3 * per_sequence + 1000})
    assert asked() == 3, "half of what is beside the weights"
    assert batch_size(5, view, 256) == 5


@pytest.mark.parametrize("path", ["/", "/../..", "/seen/by/the/machine/only"])
def test_the_root_group_of_a_container_limits_memory(system, path) -> None:
    system(f"0::{path}\n", {"memory.max": 8 * GB, "memory.current": 2 * GB})
    assert memory.available(CPU) == 6 * GB


def test_control_groups_of_version_1_limit_memory(system) -> None:
    system(
        "12:cpu,cpuacct:/job\n9:memory:/docker/abc\n0::/docker/abc\n",
        {
            "memory/memory.limit_in_bytes": 2**63 - 4096,  # none
            "memory/memory.usage_in_bytes": 50 * GB,
            "memory/docker/abc/memory.limit_in_bytes": 4 * GB,
            "memory/docker/abc/memory.usage_in_bytes": 3 * GB,
            "memory/docker/abc/memory.stat": f"inactive_file 1\ntotal_inactive_file {GB // 2}",
            "cpu,cpuacct/job/memory.limit_in_bytes": 1,
        },
    )
    assert memory.available(CPU) == 1.5 * GB
