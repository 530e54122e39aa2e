"""The model card of a folder: what was pruned and how, what it measured, how to load it.

The facts lie beside it as JSON, so that an export of the folder has a card of its own and a run can add what it
measures after it has saved the model.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfsp.errors import CheckpointError
from cfsp.plan.history import read_marker
from cfsp.system.atomic import write_bytes
from cfsp.system.escape import in_markdown
from cfsp.system.reading import read_json, read_text
from cfsp.weights.folder_check import leads_outside

log = logging.getLogger(__name__)

CARD, FACTS = "README.md", "cfsp_card.json"
#: What a card's front matter says of the licence; the last two where it is none that the hub has a name for.
#: Largest card that is read for its licence.
_MAX_CARD_BYTES = 10_000_000
_LICENCE_KEYS = ("license", "license_name", "license_link")
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.MULTILINE | re.DOTALL)

_LOADING = {
    "remote_code": """\
The layers differ in size, so the folder brings a small modelling file of its own.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
```

`cfsp.load("{name}")` needs no remote code.

- {vllm}
- llama.cpp: `cfsp export path={name} format=gguf`, then `llama-server -m {name}.gguf`
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
The layout of DeciLM (nemotron-nas) for vLLM, which has a class for it: `vllm serve {name} --trust-remote-code`.

llama.cpp's converter takes it too where the tokenizer is that of Llama 3 (128,256 tokens) or a SentencePiece one. For
any other, and shorter, `cfsp export format=gguf` makes the file of the pruned model itself.
""",
}
_VLLM = "vLLM: `vllm serve {name} --trust-remote-code`"
_NOT_VLLM = (
    "vLLM does not take it as it is, because some layers have no attention: `cfsp export path={name} format=padded`, "
    "or decilm, first"
)
_LOADING["padded"] = _LOADING["plain"] + "\nAll layers are as wide as the widest one; what was pruned is zeros.\n"


def licence_of(folder: Path) -> dict[str, Any]:
    """What a model folder's own card states of its licence in the front matter: ``license`` and, of others than the
    hub's, ``license_name`` and ``license_link``; empty where it states none."""
    import yaml

    if leads_outside(folder / CARD, folder):
        return {}
    try:
        front = _FRONT.match(read_text(folder / CARD, str(folder / CARD), limit=_MAX_CARD_BYTES))
        # BaseLoader: all values are text, so that the licence "no" is not False.
        found = yaml.load(front[1], Loader=yaml.BaseLoader) if front else {}
    except (CheckpointError, OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return {key: found[key] for key in _LICENCE_KEYS if found.get(key)} if isinstance(found, dict) else {}


def card_files(facts: Mapping[str, Any], form: str, name: str) -> dict[str, bytes]:
    """Card and facts as files: name -> content. ``facts`` as :func:`facts_of_run` gives them."""
    return {
        CARD: model_card(facts, form, name).encode(),
        FACTS: (json.dumps(facts, indent=2, sort_keys=True) + "\n").encode(),
    }


def read_facts(folder: Path) -> dict[str, Any]:
    """Return what is known of a folder; {} of one that no run wrote, and where the facts are damaged."""
    try:
        if read_marker(folder) is None:  # a file of that name may be anybody's
            return {}
        found = read_json(folder / FACTS, str(folder / FACTS), limit=100_000_000)
        if isinstance(found, dict):
            for form in ("plain", "remote_code"):
                model_card(found, form, folder.name)
            if "base_model" in found:
                _step(found)
            return found
    except Exception as error:  # any damage: the card then begins with this folder
        log.debug("%s cannot be used", folder / FACTS, exc_info=error)
    return {}


def write_card(folder: Path, facts: Mapping[str, Any], form: str) -> None:
    """Replace card and facts of a folder, each atomically.

    Raises:
        CheckpointError: they cannot be written.
    """
    for name, content in card_files(facts, form, folder.name).items():
        try:
            write_bytes(folder / name, content)
        except OSError as error:
            raise CheckpointError(
                f"{folder / name}: the model card cannot be written ({error.strerror}); free some space and give the "
                "command again"
            ) from error


def facts_of_run(
    *,
    base_model: str,
    hub_id: str | None,
    licence: Mapping[str, Any],
    plan: Any,
    calibration: Mapping[str, Any],
    state: str,
    recovery: str | None = None,
    measurements: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    earlier: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """JSON facts of a run.

    Args:
        base_model: a name, not a place: the folder may be given to others.
        plan: the run's PruningPlan.
        measurements: side -> rows as the record has them.
        earlier: the facts of the model that the run started from, where that was pruned already: base model, licence
            and the parameters before are those of the first one, and what was done is told step by step.
    """
    kept = ("suite", "task", "metric", "value", "stderr", "n", "seq_len", "num_fewshot", "unit")
    first = earlier if earlier and "base_model" in earlier else {}
    parameters = dict(plan.parameters)
    if first:
        parameters["before"] = first["parameters"]["before"]
        base_model, hub_id, licence = first["base_model"], first.get("hub_id"), first.get("licence") or {}
    return {
        "base_model": base_model,
        "hub_id": hub_id,
        "licence": dict(licence),
        "earlier": [*first.get("earlier", ()), _step(first)] if first else [],
        "method": plan.method.get("name"),
        "requested": plan.requested,
        "achieved": plan.achieved,
        "parameters": parameters,
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


def _step(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: facts[key] for key in ("method", "requested", "achieved", "calibration", "recovery")}


def facts_of_folder(folder: Path) -> dict[str, Any]:
    """Those of a folder that a run wrote, else what the folder's own card says of the licence."""
    return read_facts(folder) or {"licence": licence_of(folder)}


def model_card(facts: Mapping[str, Any], form: str, name: str) -> str:
    """Markdown with the front matter of a hub card; ``form``: remote_code, plain, padded or decilm."""
    pruned = "method" in facts
    vllm = _NOT_VLLM if pruned and _lacks_attention(facts) else _VLLM
    loading = _LOADING[form].format(name=name, vllm=vllm.format(name=name))
    licence = facts.get("licence") or {}
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if facts.get("hub_id"):
        front["base_model"] = facts["hub_id"]
    front |= licence
    if not pruned:
        return "\n".join([_front(front), f"# {name}", "", "## Loading", "", loading])
    front["tags"] = ["pruning", "structured-pruning", "cfsp"]
    facts = in_markdown(facts)
    base, parameters, steps = facts["base_model"], facts["parameters"], [*facts.get("earlier", ()), _step(facts)]
    scope = facts["requested"].get("scope", "ffn")
    pruned_to = f"{facts['achieved']['ratio']:.1%} of the {scope} parameters pruned"
    if len(steps) > 1:
        pruned_to = (
            f"pruned in {len(steps)} steps to {parameters['after'] / parameters['before']:.1%} of its parameters"
        )
    after = f"; recovered by {facts['recovery']}" if facts.get("recovery") and len(steps) == 1 else ""
    how = f"method `{facts['method']}`" if len(steps) == 1 else f"{len(steps)} steps"
    lines = [
        _front(front),
        f"# {base}, {pruned_to}",
        "",
        f"{base} after structured pruning with cfsp ({how}){after}: "
        f"{parameters['before']:,} parameters before, {parameters['after']:,} after.",
        "",
        *(_told(step, at if len(steps) > 1 else 0) for at, step in enumerate(steps, 1)),
        f"- FFN neurons of each layer: {' '.join(str(width) for width in facts['widths'])}",
        f"- KV groups of each layer: {' '.join(str(groups) for groups in facts['kv_groups'])}",
        f"- licence: {licence.get('license_name') or licence['license']}, of the base model"
        if licence.get("license")
        else "- licence: that of the base model, whose folder does not state it",
        "",
        *_measured(facts.get("measurements") or {}),
        "## Loading",
        "",
        loading,
    ]
    return "\n".join(lines)


def _front(values: Mapping[str, Any]) -> str:
    import yaml

    return f"---\n{yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)}---\n"


def _told(step: Mapping[str, Any], number: int) -> str:
    """What a step was asked for, and what it was calibrated on; ``number`` 0: it is the only one."""
    requested = step["requested"]
    asked = (
        f"{requested.get('ratio')} of the {requested.get('scope', 'ffn')} parameters; widths in multiples of "
        f"{requested.get('round_to')}"
    )
    calibration = _calibration(step["calibration"])
    if not number:
        return f"- requested: {asked}\n- calibration: {calibration}"
    recovered = f"; recovered by {step['recovery']}" if step.get("recovery") else ""
    return f"- step {number}: method `{step['method']}`; requested: {asked}; calibration: {calibration}{recovered}"


def _lacks_attention(facts: Mapping[str, Any]) -> bool:
    """Whether a layer that is there has no attention (one without both is not there)."""
    return any(width and not groups for width, groups in zip(facts["widths"], facts["kv_groups"], strict=True))


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
