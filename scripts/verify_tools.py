"""Verify the bundled model, pruned by each structure, in every format and every tool; results/verify/tools.json.

    python scripts/verify_tools.py python.vllm=PYTHON python.llama_cpp=PYTHON

PYTHON is that of an environment which has the tool; other tools are looked for here. Each model is pruned, exported
and verified by cfsp's own commands (calibration on 32 windows, no evaluation). The record has a row for each tool that
was tried, and one for each format that cannot hold a model, with the reason.
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
    "attentions and FFNs": ("pruner=block_pruner", "sparsity.ratio=0.3"),
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
        pythons = _pythons(words)
        rows = [row for removed in MODELS for row in _rows(removed, ROOT / "outputs" / "verify_tools", pythons)]
        record = {
            "schema": 1,
            "command": "python scripts/verify_tools.py " + " ".join(f"python.{name}=PYTHON" for name in pythons),
            "environment": environment.describe(),
            "tools": {name: _packages(name, pythons.get(name, sys.executable)) for name in TOOLS},
            "rows": rows,
        }
    except CfspError as error:
        print(f"verify_tools: {error}", file=sys.stderr)
        return error.exit_code
    file = ROOT / "results" / "verify" / "tools.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{file}: {len(rows)} rows")
    return 1 if any(row["outcome"] in ("differs", "fails") for row in rows) else 0


def _pythons(words: Sequence[str]) -> dict[str, str]:
    pythons = {}
    for word in words:
        key, _, python = word.partition("=")
        if not python or key not in [f"python.{name}" for name in TOOLS]:
            raise ConfigError(f"{word}: python.TOOL=PYTHON is expected, TOOL being one of {', '.join(TOOLS)}")
        pythons[key.removeprefix("python.")] = python
    return pythons


def _rows(removed: str, work: Path, pythons: dict[str, str]) -> list[dict[str, Any]]:
    words = MODELS[removed]
    out = work / removed.replace(" ", "-").replace(",", "")
    _cfsp(*words, *USUAL, f"paths.output_dir={out}", f"paths.cache_dir={work / 'cache'}", f"paths.records_dir={out}")
    rows: list[dict[str, Any]] = []
    for name in FORMATS:
        place = out / "model" if name == "hf" else out / ("model.gguf" if name == "gguf" else f"model-{name}")
        about = {"removed": removed, "run": " ".join(words), "format": name}
        # In float32, so that nothing is rounded but sums.
        given = (f"path={out / 'model'}", f"format={name}", f"to={place}", "dtype=float32")
        try:
            if name != "hf":
                _cfsp("export", *given)
        except RunError as error:
            rows.append({**about, "outcome": "refused", "note": str(error).replace(str(out), "OUT")})
            continue
        record = out / f"verified-{name}.json"
        others = [f"python.{tool}={python}" for tool, python in pythons.items()]
        _cfsp("verify", f"path={place}", f"record={record}", *others, fails=True)
        findings = json.loads(record.read_text(encoding="utf-8"))["tools"]
        tried = [row for row in findings if row["outcome"] in ("equal", "differs", "fails")]
        rows += [{**about, **row} for row in tried]
        print(removed, name, *(f"{row['tool']}: {row['outcome']}" for row in tried), flush=True)
    return rows


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
