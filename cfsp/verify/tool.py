"""Tools in which a saved model is tried, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfsp.errors import ConfigError, RunError

log = logging.getLogger(__name__)

_SCRIPTS = Path(__file__).with_name("tools")


@dataclass(frozen=True)
class Tool:
    """Tool that loads saved models.

    Attributes:
        name: name of the tool and of its script.
        module: module that can be imported where the tool is installed.
        float32: largest difference of a log-probability in float32. Where the tool's sums are PyTorch's too, only their
            order changes (threads, batches): 1e-6 was measured on small models, and depth multiplies it. Other kernels
            are allowed more.
        reads: "folder" or "gguf".
    """

    name: str
    module: str
    float32: float
    reads: str = "folder"


TOOLS = {
    tool.name: tool
    for tool in (
        Tool("transformers", "transformers", 1e-4),
        Tool("lm_eval", "lm_eval", 1e-4),
        Tool("peft", "peft", 1e-4),
        Tool("llama_cpp", "llama_cpp", 1e-3, reads="gguf"),
        Tool("vllm", "vllm", 1e-3),
    )
}


def is_installed(tool: Tool, python: str = sys.executable) -> bool:
    """Return whether ``python`` finds the tool.

    Raises:
        ConfigError: ``python`` is not a Python that can be run.
    """
    script = f"import importlib.util, sys; sys.exit(3 if importlib.util.find_spec({tool.module!r}) is None else 0)"
    try:
        process = subprocess.run([python, "-I", "-c", script], capture_output=True, text=True)
    except OSError as error:
        raise ConfigError(
            f"python.{tool.name}={python}: cannot be run ({error.strerror}); give the python of an environment, e.g. "
            f"/path/to/venv/bin/python"
        ) from error
    if process.returncode not in (0, 3):
        raise ConfigError(f"python.{tool.name}={python}: is no Python ({_last_words(process)}); give that of a venv")
    return process.returncode == 0


def ask(tool: Tool, request: Mapping[str, Any], python: str = sys.executable) -> dict[str, Any]:
    """Return the answer of the tool's script; cfsp is not on the path of its process.

    Args:
        tool: the tool.
        request: request as :mod:`cfsp.verify.tools` describes it.
        python: Python of the environment that has the tool.

    Raises:
        RunError: the tool could not load the model; carries its last line of output.
    """
    with tempfile.TemporaryDirectory(prefix="cfsp-verify-") as scratch:
        # -I leaves out PYTHONPATH and the script's own folder, whose modules have the names of the tools.
        command = [python, "-I", str(_SCRIPTS / f"{tool.name}.py"), json.dumps(request)]
        # No standard input, where transformers would ask whether to run code that it was not told to trust.
        environment = _environment(Path(scratch))
        process = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=scratch, env=environment
        )
    log.debug("%s said:\n%s", tool.name, process.stderr)
    response = _answer(process.stdout)
    if process.returncode:  # where a script knows why its tool does not take the model, its answer has an "error"
        raise RunError(str(response["error"])[-300:] if response and response.get("error") else _last_words(process))
    if response is None:
        raise RunError("it ended without an answer")
    return response


def _answer(stdout: str) -> dict[str, Any] | None:
    for line in reversed(stdout.splitlines()):  # a tool may print lines of its own after the answer
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                response: dict[str, Any] = json.loads(line)
                return response
    return None


def _environment(scratch: Path) -> dict[str, str]:
    # transformers caches a folder's code by the folder's name, which two models may share.
    return {
        **os.environ,
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _last_words(process: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
    if process.returncode < 0:
        return f"ended by {signal.Signals(-process.returncode).name}"
    return lines[-1][-300:] if lines else f"exit code {process.returncode}"
