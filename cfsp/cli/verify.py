"""``cfsp verify path=DIR``: check that other tools load a saved model and compute the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfsp.config.components import shown, suggest
from cfsp.config.overrides import plain_values
from cfsp.errors import CfspError, CheckpointError, ConfigError, RunError
from cfsp.plan.history import read_marker
from cfsp.pruned_model.shipped_code import check_folder_code
from cfsp.record.run_record import RunRecord
from cfsp.record.written import damage, within
from cfsp.system.command import command
from cfsp.system.progress import progress
from cfsp.system.reading import read_json
from cfsp.verify.tool import TOOLS, Tool, ask, is_installed

USAGE = f"""\
Load a saved model in the tools that are installed, each in a process of its own and without cfsp, and compare the
log-probabilities of fixed tokens with those that the model had in memory when it was saved.

  cfsp verify path=OUT/model                     the folder that a run wrote (path=OUT will do), or an export of it
  cfsp verify path=FILE.gguf                     a GGUF file that cfsp exported
  cfsp verify path=DIR tools=transformers,peft   these tools alone, of {", ".join(TOOLS)}
  cfsp verify path=DIR python.vllm=PYTHON        look for vLLM in another environment: /path/to/venv/bin/python
  cfsp verify path=DIR record=FILE.json          write the table as JSON too
  cfsp verify path=DIR trust_remote_code=true    run Python code in the folder that is not what cfsp writes there

A tool that is not installed is listed and does not count. Exit codes: 0 all that were tried compute the same, 1 one
differs or cannot load the model, 2 wrong input.
"""

#: Share of the free memory that the weights in float32 may take. The rest is for the tool itself.
_SHARE_OF_MEMORY = 0.6
_KEYS = ("path", "tools", "record", "trust_remote_code", *(f"python.{name}" for name in TOOLS))


@dataclass(frozen=True)
class Request:
    """A checked command line.

    Attributes:
        path: the model folder or GGUF file.
        tools: the tools to try.
        pythons: name of a tool -> Python executable of its environment.
        record: file for the table as JSON.
        trust_remote_code: run code in the folder that cfsp does not write there.
    """

    path: Path
    tools: tuple[Tool, ...]
    pythons: Mapping[str, str] = field(default_factory=dict)
    record: Path | None = None
    trust_remote_code: bool = False


def main(overrides: Sequence[str] | None = None) -> int:
    """Verify a saved model and return the exit code."""
    return command("cfsp", USAGE, overrides, lambda arguments: _verify(read_request(arguments)), verb="verify")


def read_request(overrides: Sequence[str]) -> Request:
    """Check the command line and return the request.

    Raises:
        ConfigError: a key or value is wrong; the message has all problems.
    """
    values, problems = plain_values(overrides, _KEYS, "verify")
    names = [name.strip() for name in values.get("tools", ",".join(TOOLS)).strip("[]").split(",")]
    problems += [
        f"tools={name}: there is no such tool{suggest(name, TOOLS)}; tools: {', '.join(TOOLS)}"
        for name in names
        if name not in TOOLS
    ]
    trust = values.get("trust_remote_code", "false").lower()
    if trust not in ("true", "false"):
        problems.append(f"trust_remote_code={shown(trust)}: use true or false")
    if "path" not in values and not problems:
        problems.append("path is not set: give path=DIR, the folder of a saved model; see cfsp verify --help")
    if problems:
        raise ConfigError(*problems)
    pythons = {key.removeprefix("python."): value for key, value in values.items() if key.startswith("python.")}
    return Request(
        _find_model(Path(values["path"]).expanduser()),
        tuple(TOOLS[name] for name in dict.fromkeys(names)),
        {name: str(Path(python).expanduser()) for name, python in pythons.items()},
        Path(values["record"]).expanduser() if "record" in values else None,
        trust == "true",
    )


def _find_model(path: Path) -> Path:
    """Return the model folder or GGUF file at ``path``, which may also be OUT of a run.

    Raises:
        CheckpointError: ``path`` has no model.
    """
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.exists():
        raise CheckpointError(f"path={path}: there is no such folder; give the folder of a saved model")
    if not path.is_dir():
        raise CheckpointError(f"path={path}: is neither a folder nor a GGUF file; give the folder of a saved model")
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(f"path={path}: holds no model (no config.json); give the folder of a saved model")


def _verify(request: Request) -> int:
    # Start-up time: loads numpy.
    from cfsp.checkpoint.reference import place_of, read_reference
    from cfsp.verify.comparison import Finding, compare, select_tolerance

    if request.path.is_dir():
        read_marker(request.path)
    damaged = find_damage(request.path)
    if damaged is not None:
        print(f"{request.path}: {damaged}")
    reference = read_reference(place_of(request.path))
    format_name, weights = _format_and_dtype(request.path)
    runs_code = format_name != "gguf" and (request.trust_remote_code or check_folder_code(request.path))
    dtype = "float32" if format_name == "gguf" else _tool_dtype(request.path, weights)
    # llama.cpp computes in the dtype of the GGUF file. Other tools compute in float32, where only the weights are
    # rounded.
    computed = (reference.computed, dtype, *([weights] if format_name == "gguf" else []))
    rounded = weights if format_name != "gguf" and weights != reference.stored else "float32"
    # Checked before any model is loaded, so that a wrong python.TOOL is reported at once.
    installed = {
        tool.name: is_installed(tool, request.pythons.get(tool.name, sys.executable)) for tool in request.tools
    }
    request_to_tool = {
        "path": str(request.path.resolve()),
        "file": str(request.path.resolve()),
        "token_ids": reference.token_ids.tolist(),
        "greedy": reference.greedy.shape[1],
        "dtype": dtype,
        "trust_remote_code": runs_code,
    }
    findings = []
    for tool in progress(request.tools, "verify", unit="tool"):
        unread = _unreadable_reason(tool, format_name, request.path)
        if unread:
            findings.append(Finding(tool.name, "another form", note=unread))
        elif not installed[tool.name]:
            findings.append(Finding(tool.name, "not installed"))
        else:
            try:
                response = ask(tool, request_to_tool, request.pythons.get(tool.name, sys.executable))
                allowed = select_tolerance(tool.float32, *computed, rounded=rounded)
                findings.append(compare(tool.name, response, reference, *allowed))
            except RunError as error:
                findings.append(Finding(tool.name, "fails", note=str(error)))
    if request.record is not None:
        _write_record(request.record, request.path, reference, findings)
    if not any(finding.was_run for finding in findings):
        raise ConfigError(
            f"tools={','.join(tool.name for tool in request.tools)}: none of them can be tried on {request.path} ("
            + "; ".join(f"{finding.tool}: {finding.note or finding.outcome}" for finding in findings)
            + "); install one, or name the Python that has it with python.TOOL=..."
        )
    return max(_show_findings(request.path, findings), int(damaged is not None))


def find_damage(path: Path) -> str | None:
    """Compare a model folder or GGUF file with the record of its run, if the record lies beside it.

    Returns:
        A clause about the first file that has changed since the run wrote it; None if there is no such file or no
        record.
    """
    folder = path.resolve().parent
    try:
        record = RunRecord.read(folder / "record.json")
    except CheckpointError:
        return None
    if record is None or not record.succeeded:
        return None
    return damage(within(record.files, [path.resolve().name]), folder, hashes=True)


def _unreadable_reason(tool: Tool, format_name: str, path: Path) -> str:
    """Return the reason why the tool cannot read this kind of export; empty if it can."""
    if tool.reads == "gguf":
        return "" if format_name == "gguf" else "reads GGUF files: cfsp export path=DIR format=gguf"
    if format_name == "gguf":
        return "reads model folders"
    if format_name == "decilm" and tool.name != "vllm":
        return "has no class for this folder, which is made for vLLM"
    if tool.name == "lm_eval" and not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return "needs a tokenizer, and the folder has none"
    return ""


def _format_and_dtype(path: Path) -> tuple[str, str]:
    """Return the format (gguf, decilm or folder) and the dtype of the weights."""
    if path.suffix == ".gguf":
        return "gguf", _gguf_dtype(path)
    config = read_json(path / "config.json", f"path={path}: config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"path={path}: config.json holds no keys; save the model again")
    brings = config.get("auto_map")
    # A DeciLM folder has a configuration class, but no model class for transformers.
    format_name = "decilm" if isinstance(brings, dict) and brings and "AutoModelForCausalLM" not in brings else "folder"
    return format_name, str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")


def _tool_dtype(folder: Path, weights: str) -> str:
    """Return the dtype in which the tools load the weights: float32 like the reference, if memory suffices."""
    if weights == "float32":
        return weights
    import torch

    # Start-up time: loads torch.
    from cfsp.system.memory import available
    from cfsp.weights.shards import weight_files

    stored = getattr(torch, weights, torch.float32).itemsize
    needed = sum(file.stat().st_size for file in weight_files(folder)) * torch.float32.itemsize // stored
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "float32" if needed < _SHARE_OF_MEMORY * available(device) else weights


def _gguf_dtype(file: Path) -> str:
    """Return the dtype that general.file_type states; "unknown" leads to the widest tolerance."""
    try:
        from gguf import GGUFReader, LlamaFileType

        stated: Any = GGUFReader(file).get_field("general.file_type")
        file_type = LlamaFileType(stated.contents())
    except ImportError:
        return "unknown"
    except Exception as error:  # a damaged file may raise any error in the reader
        raise CheckpointError(f"{file}: is no GGUF file that can be read ({error}); export the model again") from error
    return {"ALL_F32": "float32", "MOSTLY_F16": "float16", "MOSTLY_BF16": "bfloat16", "MOSTLY_Q8_0": "q8_0"}.get(
        file_type.name, "unknown"
    )


def _show_findings(path: Path, findings: Sequence[Any]) -> int:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)
    table = Table(
        "tool", "version", "loads", "maximum difference", "mean", "allowed", "tokens equal", "result", "note",
        box=None, pad_edge=False,
    )  # fmt: skip
    for finding in findings:
        loads = {"fails": "no"}.get(finding.outcome, "yes" if finding.was_run else "")
        table.add_row(
            finding.tool,
            finding.version,
            loads,
            "" if finding.difference is None else f"{finding.difference:.2g}",
            "" if finding.mean is None else f"{finding.mean:.2g}",
            "" if finding.tolerance is None else f"{finding.tolerance:g}",
            finding.tokens,
            finding.outcome,
            finding.note,
        )
    console.print(table)
    tried = [finding for finding in findings if finding.was_run]
    wrong = [finding.tool for finding in tried if finding.outcome != "equal"]
    if wrong:
        print(f"{path}: is not the saved model in {', '.join(wrong)}")
        return 1
    print(f"{path}: the saved model in {', '.join(finding.tool for finding in tried)}")
    return 0


def _write_record(file: Path, path: Path, reference: Any, findings: Sequence[Any]) -> None:
    content = {
        "schema": 1,
        "model": path.name,
        "windows": list(reference.token_ids.shape),
        "computed": reference.computed,
        "stored": reference.stored,
        "tools": [finding.as_dict() for finding in findings],
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CfspError(f"record={file}: cannot be written ({error.strerror}); give another file") from error
