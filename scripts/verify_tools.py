"""Verify a model, pruned by each structure, in every format and every tool; writes results/verify/NAME.json.

    python scripts/verify_tools.py python.vllm=PYTHON python.llama_cpp=PYTHON                    the bundled model
    python scripts/verify_tools.py name=NAME model=local model.path=FILE.gguf calibration.path=TEXT ...    another

PYTHON is that of an environment which has the tool; other tools are looked for here. ``python.TOOL=A,B`` asks the tool
in several environments, one after the other, where ``here`` is this one. Other words go to the runs. Each model is
pruned, exported and verified by cfsp's own commands (calibration on 32 windows, no evaluation). The record has a row
for each tool that was tried, and one for each format that cannot hold a model, with the reason. A structure that was
finished by an earlier call with the same words is not repeated; each row has the commit that it was verified with.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfsp.errors import CfspError, ConfigError, RunError
from cfsp.record import environment
from cfsp.verify.tool import TOOLS

ROOT = Path(__file__).resolve().parent.parent
#: Words of the run, by what it removes.
MODELS = {
    "FFN neurons": ("pruner=cfsp",),
    "FFN neurons, as many of each block": ("pruner=uniform",),
    "FFN neurons and KV groups": ("pruner=flap_al_am", "sparsity.ratio=0.3"),
    "FFN neurons and attentions": ("pruner=two_ssp", "sparsity.ratio=0.4"),
    "attentions and FFNs": ("pruner=block_pruner", "sparsity.ratio=0.15", "pruner.search_sequences=1"),
    "blocks": ("pruner=shortgpt", "sparsity.scope=decoder", "sparsity.ratio=0.3"),
    "FFN neurons, recovered": ("pruner=cfsp", "recovery=lora", "recovery/data=self", "recovery.max_steps=20"),
}
USUAL = ("evaluation=none", "logger=none", "calibration.n_samples=32", "force=true")
FORMATS = ("hf", "padded", "decilm", "gguf")


def main() -> int:
    """Write the record; returns the exit code."""
    words = sys.argv[1:]
    if any(word in ("-h", "--help") for word in words):
        print(__doc__)
        return 0
    try:
        name, pythons, overrides = _request(words)
        work = ROOT / "outputs" / f"verify_{name}"
        rows = [row for removed in MODELS for row in _rows_once(removed, work, pythons, overrides)]
        places = " ".join(f"python.{tool}=PYTHON" for tool in pythons)
        named = "" if name == "tools" else f"name={name} "
        record = {
            "schema": 1,
            "command": " ".join(f"python scripts/verify_tools.py {named}{' '.join(overrides)} {places}".split()),
            "environment": environment.describe(),
            "tools": {
                tool: [_packages(tool, python) for python in pythons.get(tool, [sys.executable])] for tool in TOOLS
            },
            "rows": rows,
        }
    except CfspError as error:
        print(f"verify_tools: {error}", file=sys.stderr)
        return error.exit_code
    file = ROOT / "results" / "verify" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{file}: {len(rows)} rows")
    return 1 if any(row["outcome"] in ("differs", "fails") for row in rows) else 0


def _request(words: Sequence[str]) -> tuple[str, dict[str, list[str]], list[str]]:
    """Return the name of the record, the Pythons of each tool, and the overrides of the runs."""
    name, pythons, overrides = "tools", dict[str, list[str]](), []
    for word in words:
        key, _, value = word.partition("=")
        if not value:
            raise ConfigError(f"{word}: KEY=VALUE is expected")
        if key == "name":
            name = value
        elif key.startswith("python."):
            tool = key.removeprefix("python.")
            if tool not in TOOLS:
                raise ConfigError(f"{word}: python.TOOL=PYTHON is expected, TOOL being one of {', '.join(TOOLS)}")
            pythons[tool] = [sys.executable if python == "here" else python for python in value.split(",")]
        else:
            overrides.append(word)
    return name, pythons, overrides


def _rows_once(
    removed: str, work: Path, pythons: dict[str, list[str]], overrides: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the rows of a structure, from the file of an earlier call where that had the same words."""
    file = work / f"{removed.replace(' ', '-').replace(',', '')}.json"
    words = json.loads(json.dumps([MODELS[removed], pythons, list(overrides)]))
    if file.is_file():
        earlier = json.loads(file.read_text(encoding="utf-8"))
        if earlier["words"] == words:
            rows: list[dict[str, Any]] = earlier["rows"]
            return rows
    rows = _rows(removed, work, pythons, overrides)
    file.write_text(json.dumps({"words": words, "rows": rows}), encoding="utf-8")
    return rows


def _rows(removed: str, work: Path, pythons: dict[str, list[str]], overrides: Sequence[str]) -> list[dict[str, Any]]:
    words = MODELS[removed]
    out = work / removed.replace(" ", "-").replace(",", "")
    places = (f"paths.output_dir={out}", f"paths.cache_dir={work / 'cache'}", f"paths.records_dir={out}")
    _cfsp(*words, *USUAL, *overrides, *places)
    rows: list[dict[str, Any]] = []
    commit = (environment.describe()["git"] or {}).get("commit", "")
    for name in FORMATS:
        place = out / "model" if name == "hf" else out / ("model.gguf" if name == "gguf" else f"model-{name}")
        about = {"removed": removed, "run": " ".join(words), "format": name, "commit": commit}
        # In float32, so that nothing is rounded but sums.
        given = (f"path={out / 'model'}", f"format={name}", f"to={place}", "dtype=float32")
        try:
            if name != "hf":
                _cfsp("export", *given)
        except RunError as error:
            rows.append({**about, "outcome": "refused", "note": str(error).replace(str(out), "OUT")})
            continue
        tried = _verified(place, out / f"verified-{name}.json", pythons)
        rows += [{**about, **row} for row in tried]
        print(removed, name, *(f"{row['tool']}: {row['outcome']}" for row in tried), flush=True)
    return rows


def _verified(place: Path, record: Path, pythons: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Verify a folder or file in every tool and environment; returns the rows of those that were tried."""
    firsts = [f"python.{tool}={several[0]}" for tool, several in pythons.items()]
    calls = [firsts]
    calls += [[f"tools={tool}", f"python.{tool}={other}"] for tool, several in pythons.items() for other in several[1:]]
    rows = []
    for words in calls:
        try:
            _cfsp("verify", f"path={place}", f"record={record}", *words, fails=True)
        except RunError as error:
            if "none of them can be tried" not in str(error):
                raise
            continue  # that tool alone was asked, and it does not read this format
        rows += json.loads(record.read_text(encoding="utf-8"))["tools"]
    return [row for row in rows if row["outcome"] in ("equal", "differs", "fails")]


def _cfsp(*words: str, fails: bool = False) -> None:
    """Run a command; ``fails``: exit code 1 is an answer."""
    ended = subprocess.run([sys.executable, "-m", "cfsp.run", *words], capture_output=True, text=True)
    if ended.returncode not in ((0, 1) if fails else (0,)):
        raise RunError(" ".join(ended.stderr.split()).removeprefix("cfsp: ") or f"exit code {ended.returncode}")


def _packages(name: str, python: str) -> dict[str, str]:
    """Return the versions of the tool, of torch and of transformers, as far as ``python`` has them."""
    program = (
        "import json; from importlib.metadata import packages_distributions, version; found = packages_distributions();"
        f"print(json.dumps({{d: version(d) for m in ({TOOLS[name].module!r}, 'torch', 'transformers') "
        "for d in found.get(m, ())}))"
    )
    ended = subprocess.run([python, "-I", "-c", program], capture_output=True, text=True, check=True)
    versions: dict[str, str] = json.loads(ended.stdout)
    return versions if any(TOOLS[name].module in key.replace("-", "_") for key in versions) else {}


if __name__ == "__main__":
    sys.exit(main())
