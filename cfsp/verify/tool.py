"""The tools that a saved model is tried in, each in a process of its own."""

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
    """
    module: what is importable where the tool is installed.
    float32: by how much a log-probability may differ in float32. Where the sums are PyTorch's too only their order
        changes (threads, batches): 1e-6 is measured on small models, and depth multiplies it. Other kernels get more.
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
    """Whether ``python`` finds the tool.

    Raises:
        ConfigError: it is no Python.
    """
    question = f"import importlib.util, sys; sys.exit(3 if importlib.util.find_spec({tool.module!r}) is None else 0)"
    try:
        ended = subprocess.run([python, "-I", "-c", question], capture_output=True, text=True)
    except OSError as error:
        raise ConfigError(
            f"python.{tool.name}={python}: cannot be run ({error.strerror}); give the python of an environment, e.g. "
            f"/path/to/venv/bin/python"
        ) from error
    if ended.returncode not in (0, 3):
        raise ConfigError(f"python.{tool.name}={python}: is no Python ({_last_words(ended)}); give that of a venv")
    return ended.returncode == 0


def ask(tool: Tool, request: Mapping[str, Any], python: str = sys.executable) -> dict[str, Any]:
    """What the tool's script answers; cfsp is not on the path of its process.

    Raises:
        RunError: it could not load the model; its last words.
    """
    with tempfile.TemporaryDirectory(prefix="cfsp-verify-") as scratch:
        # -I: neither PYTHONPATH nor the script's own folder, whose modules are named like the tools.
        words = [python, "-I", str(_SCRIPTS / f"{tool.name}.py"), json.dumps(request)]
        # Without an input: transformers would ask there whether to run code that it was not told to trust.
        environment = _environment(Path(scratch))
        ended = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=scratch, env=environment
        )
    log.debug("%s said:\n%s", tool.name, ended.stderr)
    answer = _answer(ended.stdout)
    if ended.returncode:  # a script that knows why its tool does not take the model says so in its answer
        raise RunError(str(answer["error"])[-300:] if answer and answer.get("error") else _last_words(ended))
    if answer is None:
        raise RunError("it ended without an answer")
    return answer


def _answer(said: str) -> dict[str, Any] | None:
    for line in reversed(said.splitlines()):  # a tool may have words of its own after the answer
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                answer: dict[str, Any] = json.loads(line)
                return answer
    return None


def _environment(scratch: Path) -> dict[str, str]:
    # Code of a folder is cached by the folder's name: another model's of the same name must not be taken for it.
    return {
        **os.environ,
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _last_words(ended: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in ended.stderr.splitlines() if line.strip()]
    if ended.returncode < 0:
        return f"ended by {signal.Signals(-ended.returncode).name}"
    return lines[-1][-300:] if lines else f"exit code {ended.returncode}"
