"""Virtual environments for packages that the project does not depend on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cfsp.errors import RunError
from cfsp.system.package import ROOT


def create_environment(
    packages: Sequence[str], folder: Path, *options: str, beside: Sequence[str] = (), failure: str
) -> Path:
    """Create a virtual environment unless it exists with these packages; return its Python.

    Args:
        packages: requirements to install. An environment with other requirements is created again.
        folder: folder of the environment.
        options: options of pip install.
        beside: further requirements, pinned by the constraints of the project if the file is present.
        failure: message of the error; ``{message}`` in it is replaced by the end of pip's error output.

    Raises:
        RunError: the environment could not be created.
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
