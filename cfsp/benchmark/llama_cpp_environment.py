"""Build llama-cpp-python from its source distribution in a separate environment.

    cfsp benchmark llama_cpp_environment [folder=FOLDER]

Prints the path of the environment's Python. An existing environment is kept. folder: the folder; default:
$CFSP_LLAMA_CPP or ~/.cache/cfsp/llama_cpp. The build needs a C++ compiler, a package index and about 6 minutes on 2
cores. The slow tests (tests/e2e/test_llama_cpp.py) and `cfsp benchmark llama_cpp` use the environment. Exit codes: 0 it
is ready, 1 it cannot be built, 2 wrong input.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cfsp.benchmark.environments import create_environment
from cfsp.errors import ConfigError
from cfsp.sweep.experiment import override_values
from cfsp.system.command import command

#: Packages of the environment. The project does not depend on them.
PACKAGES = ("llama-cpp-python==0.3.36", "numpy")
VARIABLE = "CFSP_LLAMA_CPP"


def default_folder() -> Path:
    """Return the folder in which the environment is expected."""
    return Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "cfsp" / "llama_cpp")


def create_llama_cpp_environment(folder: Path) -> Path:
    """Build the environment in ``folder`` unless it exists; return its Python.

    Raises:
        RunError: it could not be built; the message has the end of pip's error output.
    """
    failure = f"llama-cpp-python could not be built in {folder}: {{message}}; a compiler and pip's index are needed"
    return create_environment(PACKAGES, folder, "--no-binary", "llama-cpp-python", failure=failure)


def main(overrides: Sequence[str] | None = None) -> int:
    """Build the environment and return the exit code."""
    arguments = sys.argv[1:] if overrides is None else list(overrides)
    return command("llama_cpp_environment", str(__doc__), arguments or [f"folder={default_folder()}"], _build)


def _build(overrides: Sequence[str]) -> int:
    values = override_values(overrides)
    if set(values) != {"folder"} or isinstance(values["folder"], list):
        raise ConfigError("give folder=FOLDER alone, or nothing")
    print(create_llama_cpp_environment(Path(str(values["folder"])).expanduser()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
