"""Build llama-cpp-python from its source distribution, in an environment of its own that nothing else shares.

    cfsp benchmark llama_cpp_environment [folder=FOLDER]

Prints the path of its Python. What is there already is left. folder: where; without it $CFSP_LLAMA_CPP or
~/.cache/cfsp/llama_cpp. It takes about 6 minutes on 2 cores, a C++ compiler and a package index. With it the slow tests
(tests/e2e/test_llama_cpp.py) and `cfsp benchmark llama_cpp` run. Exit codes: 0 it is there, 1 it cannot be built,
2 wrong input.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cfsp.benchmark.environments import python_with
from cfsp.errors import ConfigError
from cfsp.sweep.experiment import override_values
from cfsp.system.command import command

#: Packages of the environment. They are no dependencies of the project.
PACKAGES = ("llama-cpp-python==0.3.36", "numpy")
VARIABLE = "CFSP_LLAMA_CPP"


def default_folder() -> Path:
    """Return the folder that the environment is looked for in."""
    return Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "cfsp" / "llama_cpp")


def environment(folder: Path) -> Path:
    """Return the Python of the environment in ``folder``, which is built where it is not there.

    Raises:
        RunError: it could not be built; has the message of pip.
    """
    failure = f"llama-cpp-python could not be built in {folder}: {{message}}; a compiler and pip's index are needed"
    return python_with(PACKAGES, folder, "--no-binary", "llama-cpp-python", failure=failure)


def main(overrides: Sequence[str] | None = None) -> int:
    """Build the environment; returns the exit code."""
    arguments = sys.argv[1:] if overrides is None else list(overrides)
    return command("llama_cpp_environment", str(__doc__), arguments or [f"folder={default_folder()}"], _build)


def _build(overrides: Sequence[str]) -> int:
    values = override_values(overrides)
    if set(values) != {"folder"} or isinstance(values["folder"], list):
        raise ConfigError("give folder=FOLDER alone, or nothing")
    print(environment(Path(str(values["folder"])).expanduser()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
