"""Environment of a run: commit, package versions and hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from typing import Any

from cfsp.system.package import ROOT

PACKAGES = (
    "cfsp",
    "torch",
    "transformers",
    "datasets",
    "peft",
    "hydra-core",
    "lm-eval",
    "wandb",
    "numpy",
    "safetensors",
)


@cache
def versions() -> dict[str, str]:
    """Return the installed versions of the packages that the project depends on."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def describe() -> dict[str, Any]:
    """Return the environment as the record holds it, without paths and host name."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "git": _git(),
        "packages": dict(versions()),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def cores() -> int:
    """Return the number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _git() -> dict[str, Any] | None:
    """Return the checkout's commit, and whether it is dirty; None for an installed wheel."""
    if not (ROOT.parent / ".git").exists():
        return None
    try:
        run = lambda *args: subprocess.run(  # noqa: E731
            ["git", *args], cwd=ROOT.parent, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        # results/ holds records and no code, so a record that a sweep puts there does not make the checkout dirty.
        changed = run("status", "--porcelain", "--", ".", ":(exclude)results")
        return {"commit": run("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None


@cache
def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            return next(line.split(":", 1)[1].strip() for line in stream if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
