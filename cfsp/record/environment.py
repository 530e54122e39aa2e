"""Where a run ran: commit, package versions, hardware."""

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
    """Installed versions of what the project stands on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe() -> dict[str, Any]:
    """For the record; no path and no host name."""
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
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _git() -> dict[str, Any] | None:
    """The checkout's commit; None for an installed wheel."""
    if not (ROOT.parent / ".git").exists():
        return None
    try:
        run = lambda *args: subprocess.run(  # noqa: E731
            ["git", *args], cwd=ROOT.parent, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        # results/ is what runs write, no code: a record that a sweep puts there changes nothing of its next run.
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
