"""The model card of a folder: what was pruned and how, what it measured, how to load it.

The facts lie beside it as JSON, so that an export of the folder has a card of its own and a run can add what it
measures after it has saved the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CARD, FACTS = "README.md", "cfsp_card.json"

_LOADING = {
    "remote_code": """\
The layers differ in size, so the folder brings a small modelling file of its own.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
```

`cfsp.load("{name}")` needs no remote code. vLLM: `vllm serve {name} --trust-remote-code`. llama.cpp:
`cfsp export path={name} format=gguf`, then `llama-server -m {name}.gguf`.
""",
    "plain": """\
A folder of the base architecture, which needs no code of its own.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

vLLM: `vllm serve {name}`.
""",
    "decilm": """\
The layout of DeciLM (nemotron-nas) for vLLM, which has a class for it, and for llama.cpp's converter.

`vllm serve {name} --trust-remote-code`
""",
}
_LOADING["padded"] = _LOADING["plain"] + "\nAll layers are as wide as the widest one; what was pruned is zeros.\n"


def licence_of(folder: Path) -> str | None:
    """The licence that a model folder's own card states in its front matter; None where it states none."""
    import yaml

    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        found = front.get("license") if isinstance(front, dict) else None
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return None
    return str(found) if found else None


def card_files(facts: Mapping[str, Any], form: str, name: str) -> dict[str, bytes]:
    """Card and facts as files: name -> content. ``facts`` as :func:`facts_of_run` gives them."""
    return {
        CARD: model_card(facts, form, name).encode(),
        FACTS: (json.dumps(facts, indent=2, sort_keys=True) + "\n").encode(),
    }


def read_facts(folder: Path) -> dict[str, Any]:
    """What is known of a folder; {} of one that no run wrote."""
    try:
        found = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_card(folder: Path, facts: Mapping[str, Any], form: str) -> None:
    """Replace card and facts of a folder, each atomically."""
    for name, content in card_files(facts, form, folder.name).items():
        partial = folder / f".{name}.{os.getpid()}"
        partial.write_bytes(content)
        os.replace(partial, folder / name)


def facts_of_run(
    *,
    base_model: str,
    licence: str | None,
    plan: Any,
    calibration: Mapping[str, Any],
    state: str,
    recovery: str | None = None,
    measurements: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> dict[str, Any]:
    """JSON facts of a run; ``plan`` is its PruningPlan, ``measurements`` side -> rows as the record has them."""
    kept = ("suite", "task", "metric", "value", "stderr", "n", "seq_len", "num_fewshot", "unit")
    return {
        "base_model": base_model,
        "licence": licence,
        "method": plan.method.get("name"),
        "requested": plan.requested,
        "achieved": plan.achieved,
        "parameters": plan.parameters,
        "widths": [row["width"] for row in plan.details],
        "kv_groups": [row["kv_groups"] for row in plan.details],
        "calibration": dict(calibration),
        "state": state,
        "recovery": recovery,
        "measurements": {
            side: [{key: row.get(key) for key in kept} for row in rows if row.get("suite") != "cost"]
            for side, rows in (measurements or {}).items()
        },
    }


def model_card(facts: Mapping[str, Any], form: str, name: str) -> str:
    """Markdown with the front matter of a hub card; ``form``: remote_code, plain, padded or decilm."""
    loading = _LOADING[form].format(name=name)
    if not facts:
        return f"---\nlibrary_name: transformers\n---\n\n# {name}\n\n## Loading\n\n{loading}"
    base, hub = _base(str(facts["base_model"]))
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    front += [f"base_model: {hub}"] if hub else []
    front += [f"license: {facts['licence']}"] if facts.get("licence") else []
    front += ["tags:", "- pruning", "- structured-pruning", "- cfsp", "---"]
    parameters, achieved, requested = facts["parameters"], facts["achieved"], facts["requested"]
    scope = requested.get("scope", "ffn")
    after = f"; recovered by {facts['recovery']}" if facts.get("recovery") else ""
    lines = [
        *front,
        "",
        f"# {base}, {achieved['ratio']:.1%} of the {scope} parameters pruned",
        "",
        f"{base} after structured pruning with cfsp (method `{facts['method']}`){after}: "
        f"{parameters['before']:,} parameters before, {parameters['after']:,} after.",
        "",
        f"- requested: {requested.get('ratio')} of the {scope} parameters; widths in multiples of "
        f"{requested.get('round_to')}",
        f"- FFN neurons of each layer: {' '.join(str(width) for width in facts['widths'])}",
        f"- KV groups of each layer: {' '.join(str(groups) for groups in facts['kv_groups'])}",
        f"- calibration: {_calibration(facts['calibration'])}",
        f"- licence: {facts['licence']}, of the base model"
        if facts.get("licence")
        else "- licence: that of the base model, whose folder does not state it",
        "",
        *_measured(facts.get("measurements") or {}),
        "## Loading",
        "",
        loading,
    ]
    return "\n".join(lines)


def _base(origin: str) -> tuple[str, str | None]:
    """(name to show, hub id or None) of where the base model came from: a folder, or ``hub id@commit``."""
    if origin.startswith("pkg://") or "@" not in origin:
        return Path(origin.removeprefix("pkg://")).name, None
    hub = origin.partition("@")[0]
    return hub.rpartition("/")[2], hub


def _calibration(found: Mapping[str, Any]) -> str:
    known = {"n_samples", "seq_len"} <= found.keys()
    sizes = f"{found['n_samples']} windows of {found['seq_len']} tokens" if known else ""
    return ", ".join(part for part in (str(found.get("name", "")), sizes) if part) or "none"


def _measured(measurements: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    sides = [side for side in ("dense", "pruned", "recovered") if measurements.get(side)]
    rows: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for side in sides:
        for row in measurements[side]:
            rows.setdefault((row["suite"], row["task"], row["metric"]), {})[side] = row
    if not rows:
        return []
    lines = ["## Measured", "", f"| | {' | '.join(sides)} |", f"| --- | {' | '.join('--:' for _ in sides)} |"]
    for (_, task, metric), found in rows.items():
        one = next(iter(found.values()))
        notes = [f"windows of {one['seq_len']}"] if metric == "perplexity" else [f"n={one['n']}"]
        notes += [f"{one['num_fewshot']}-shot"] if one.get("num_fewshot") is not None and metric != "perplexity" else []
        cells = [_value(found.get(side)) for side in sides]
        lines.append(f"| {task}, {metric} ({', '.join(notes)}) | {' | '.join(cells)} |")
    return [*lines, ""]


def _value(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    spread = f" ± {row['stderr']:.3f}" if row.get("stderr") else ""
    return f"{row['value']:.2f}" if row["metric"] == "perplexity" else f"{row['value']:.3f}{spread}"
