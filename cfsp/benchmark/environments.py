"""Environments with packages that are no dependencies of the project, made once in a folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cfsp.errors import RunError
from cfsp.system.package import ROOT


def python_with(packages: Sequence[str], folder: Path, *options: str, beside: Sequence[str] = (), failure: str) -> Path:
    """Return the Python of an environment in ``folder``, which is made where it does not have these packages.

    Args:
        packages: requirements that decide whether the environment is the one that is needed.
        folder: its folder.
        options: options of pip install.
        beside: further requirements, pinned by the project's constraints where these are at hand.
        failure: text of the error; ``{message}`` in it becomes the end of what pip says.

    Raises:
        RunError: it could not be made.
    """
    python, done = folder / "bin" / "python", folder / ".installed"
    requirements = "\n".join(packages) + "\n"
    if done.is_file() and done.read_text(encoding="utf-8") == requirements:
        return python
    constraints = ROOT.parent / "constraints.txt"
    pinned = ["--constraint", str(constraints)] if constraints.is_file() else []
    for command_line in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", *options, *pinned, *beside, *packages],
    ):
        process = subprocess.run(command_line, capture_output=True, text=True)
        if process.returncode:
            raise RunError(failure.replace("{message}", " ".join(process.stderr.split())[-300:]))
    done.write_text(requirements, encoding="utf-8")
    return python
