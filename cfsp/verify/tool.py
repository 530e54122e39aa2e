"""Tools that load a saved model for comparison, each in its own process."""

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
        module: Python module of the tool, which can be imported if the tool is installed.
        float32: largest allowed difference of a log-probability in float32. Tools that use PyTorch differ only in the
            order of sums (threads, batches). 1e-6 was measured on small models, and the difference grows with depth.
            Tools with other kernels are allowed more.
        reads: what the tool loads, "folder" or "gguf".
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
    """Return whether the tool is installed in the environment of ``python``.

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
        raise ConfigError(
            f"python.{tool.name}={python}: is no Python ({_last_output_line(process)}); give that of a venv"
        )
    return process.returncode == 0


def ask(tool: Tool, request: Mapping[str, Any], python: str = sys.executable) -> dict[str, Any]:
    """Run the tool's script and return its answer. cfsp is not on the path of the script's process.

    Args:
        tool: the tool.
        request: request as :mod:`cfsp.verify.tools` describes it.
        python: Python of the environment that has the tool.

    Raises:
        RunError: the tool could not load the model or gave no answer; the message is its reason or last line of output.
    """
    with tempfile.TemporaryDirectory(prefix="cfsp-verify-") as scratch:
        # -I removes PYTHONPATH and the script's folder from the path, since scripts there have the names of the tools.
        command = [python, "-I", str(_SCRIPTS / f"{tool.name}.py"), json.dumps(request)]
        # Without standard input, transformers cannot ask whether to run remote code, and fails instead.
        environment = _environment(Path(scratch))
        process = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=scratch, env=environment
        )
    log.debug("stderr of %s:\n%s", tool.name, process.stderr)
    response = _parse_answer(process.stdout)
    if process.returncode:  # "error": the script knows why its tool rejects the model
        raise RunError(
            str(response["error"])[-300:] if response and response.get("error") else _last_output_line(process)
        )
    if response is None:
        raise RunError("it ended without an answer")
    return response


def _parse_answer(stdout: str) -> dict[str, Any] | None:
    """Return the last JSON object in a script's output; None if there is none."""
    for line in reversed(stdout.splitlines()):  # a tool may print lines of its own after the answer
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                response: dict[str, Any] = json.loads(line)
                return response
    return None


def _environment(scratch: Path) -> dict[str, str]:
    # transformers caches a folder's code by the folder's name, so two models with the same name need separate caches.
    return {
        **os.environ,
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _last_output_line(process: subprocess.CompletedProcess[str]) -> str:
    """Return the last line of stderr, or the signal or exit code that ended the process."""
    lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
    if process.returncode < 0:
        return f"ended by {signal.Signals(-process.returncode).name}"
    return lines[-1][-300:] if lines else f"exit code {process.returncode}"
