"""Model card of a folder: what was pruned and how, which figures were measured, and how to load it.

The facts are kept beside the card as JSON. An export of the folder makes its own card from them, and a run adds the
figures that it measures after saving the model.
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
#: Largest card that is read for its licence.
_MAX_CARD_BYTES = 10_000_000
#: Keys of a card's front matter for the licence; the last two are for licences that the hub has no name for.
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


def read_licence(folder: Path) -> dict[str, Any]:
    """Return the licence that the front matter of a folder's own model card states.

    Returns:
        ``license`` and, for a licence that the hub has no name for, ``license_name`` and ``license_link``; empty where
        the card states none.
    """
    import yaml

    if leads_outside(folder / CARD, folder):
        return {}
    try:
        front = _FRONT.match(read_text(folder / CARD, str(folder / CARD), limit=_MAX_CARD_BYTES))
        # BaseLoader: all values are text, so that the licence "no" is not False.
        values = yaml.load(front[1], Loader=yaml.BaseLoader) if front else {}
    except (CheckpointError, OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return {key: values[key] for key in _LICENCE_KEYS if values.get(key)} if isinstance(values, dict) else {}


def card_files(facts: Mapping[str, Any], format: str, name: str) -> dict[str, bytes]:
    """Return the card and its facts as files: name -> content.

    Args:
        facts: facts from :func:`facts_of_run` or :func:`facts_of_folder`.
        format: remote_code, plain, padded or decilm.
        name: name of the folder, as it stands in the commands of the card.
    """
    return {
        CARD: model_card(facts, format, name).encode(),
        FACTS: (json.dumps(facts, indent=2, sort_keys=True) + "\n").encode(),
    }


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the facts of a folder; {} where no run wrote the folder, or where the facts are damaged."""
    try:
        if read_marker(folder) is None:  # without the marker, a file of this name may be somebody else's
            return {}
        facts = read_json(folder / FACTS, str(folder / FACTS), limit=100_000_000)
        if isinstance(facts, dict):
            for format in ("plain", "remote_code"):
                model_card(facts, format, folder.name)
            if "base_model" in facts:
                _step_facts(facts)
            return facts
    except Exception as error:  # whatever the damage, the card then starts from this folder
        log.debug("%s cannot be used", folder / FACTS, exc_info=error)
    return {}


def write_card(folder: Path, facts: Mapping[str, Any], format: str) -> None:
    """Replace the card and the facts of a folder, each atomically.

    Raises:
        CheckpointError: they cannot be written.
    """
    for name, content in card_files(facts, format, folder.name).items():
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
    weights: str | None = None,
) -> dict[str, Any]:
    """Return the facts of a run, as JSON values.

    Args:
        base_model: name of the base model. A path would not do, because the folder may be given to others.
        hub_id: id of the base model on the hub; None where it has none.
        licence: licence as :func:`read_licence` returns it.
        plan: the run's PruningPlan.
        calibration: name, number of samples and sequence length of the calibration set.
        state: pruned, compensated or recovered.
        recovery: name of the recovery; None where there was none.
        measurements: side -> figures as the record holds them.
        earlier: facts of the model that the run started from, where that was pruned already. Base model, licence and
            the parameters before pruning are then those of the first model, and the steps are listed one by one.
        weights: a sentence on base weights that were quantised before; None where they were not.
    """
    kept = ("suite", "task", "metric", "value", "stderr", "n", "seq_len", "num_fewshot", "unit")
    first = earlier if earlier and "base_model" in earlier else {}
    parameters = dict(plan.parameters)
    if first:
        parameters["before"] = first["parameters"]["before"]
        base_model, hub_id, licence = first["base_model"], first.get("hub_id"), first.get("licence") or {}
        weights = first.get("weights")
    return {
        "base_model": base_model,
        "hub_id": hub_id,
        "licence": dict(licence),
        **({"weights": weights} if weights else {}),
        "earlier": [*first.get("earlier", ()), _step_facts(first)] if first else [],
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


def _step_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: facts[key] for key in ("method", "requested", "achieved", "calibration", "recovery")}


def facts_of_folder(folder: Path) -> dict[str, Any]:
    """Return the facts of a folder that a run wrote; otherwise the licence that the folder's own card states."""
    return read_facts(folder) or {"licence": read_licence(folder)}


def model_card(facts: Mapping[str, Any], format: str, name: str) -> str:
    """Return the model card: Markdown with the front matter of a hub card.

    Args:
        facts: facts from :func:`facts_of_run` or :func:`facts_of_folder`.
        format: remote_code, plain, padded or decilm.
        name: name of the folder, as it stands in the commands of the card.
    """
    pruned = "method" in facts
    vllm = _NOT_VLLM if pruned and _lacks_attention(facts) else _VLLM
    loading = _LOADING[format].format(name=name, vllm=vllm.format(name=name))
    licence = facts.get("licence") or {}
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if facts.get("hub_id"):
        front["base_model"] = facts["hub_id"]
    front |= licence
    if not pruned:
        return "\n".join([_front_matter(front), f"# {name}", "", "## Loading", "", loading])
    front["tags"] = ["pruning", "structured-pruning", "cfsp"]
    facts = in_markdown(facts)
    base, parameters, steps = facts["base_model"], facts["parameters"], [*facts.get("earlier", ()), _step_facts(facts)]
    scope = facts["requested"].get("scope", "ffn")
    pruned_to = f"{facts['achieved']['ratio']:.1%} of the {scope} parameters pruned"
    if len(steps) > 1:
        pruned_to = (
            f"pruned in {len(steps)} steps to {parameters['after'] / parameters['before']:.1%} of its parameters"
        )
    after = f"; recovered by {facts['recovery']}" if facts.get("recovery") and len(steps) == 1 else ""
    how = f"method `{facts['method']}`" if len(steps) == 1 else f"{len(steps)} steps"
    lines = [
        _front_matter(front),
        f"# {base}, {pruned_to}",
        "",
        f"{base} after structured pruning with cfsp ({how}){after}: "
        f"{parameters['before']:,} parameters before, {parameters['after']:,} after.",
        "",
        *([f"- base model: {facts['weights']}"] if facts.get("weights") else []),
        *(_step_line(step, at if len(steps) > 1 else 0) for at, step in enumerate(steps, 1)),
        f"- FFN neurons of each layer: {' '.join(str(width) for width in facts['widths'])}",
        f"- KV groups of each layer: {' '.join(str(groups) for groups in facts['kv_groups'])}",
        f"- licence: {licence.get('license_name') or licence['license']}, of the base model"
        if licence.get("license")
        else "- licence: that of the base model, whose folder does not state it",
        "",
        *_measurement_lines(facts.get("measurements") or {}),
        "## Loading",
        "",
        loading,
    ]
    return "\n".join(lines)


def _front_matter(values: Mapping[str, Any]) -> str:
    import yaml

    return f"---\n{yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)}---\n"


def _step_line(step: Mapping[str, Any], number: int) -> str:
    """Describe the request and the calibration of a step; ``number`` 0: there is only one step."""
    requested = step["requested"]
    request = (
        f"{requested.get('ratio')} of the {requested.get('scope', 'ffn')} parameters; widths in multiples of "
        f"{requested.get('round_to')}"
    )
    calibration = _calibration_text(step["calibration"])
    if not number:
        return f"- requested: {request}\n- calibration: {calibration}"
    recovered = f"; recovered by {step['recovery']}" if step.get("recovery") else ""
    return f"- step {number}: method `{step['method']}`; requested: {request}; calibration: {calibration}{recovered}"


def _lacks_attention(facts: Mapping[str, Any]) -> bool:
    """Return whether a layer has an FFN but no attention; a layer without both is not in the model."""
    return any(width and not groups for width, groups in zip(facts["widths"], facts["kv_groups"], strict=True))


def _calibration_text(calibration: Mapping[str, Any]) -> str:
    has_size = {"n_samples", "seq_len"} <= calibration.keys()
    sizes = f"{calibration['n_samples']} windows of {calibration['seq_len']} tokens" if has_size else ""
    return ", ".join(part for part in (str(calibration.get("name", "")), sizes) if part) or "none"


def _measurement_lines(measurements: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    sides = [side for side in ("dense", "pruned", "recovered") if measurements.get(side)]
    rows: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for side in sides:
        for row in measurements[side]:
            rows.setdefault((row["suite"], row["task"], row["metric"]), {})[side] = row
    if not rows:
        return []
    lines = ["## Measured", "", f"| | {' | '.join(sides)} |", f"| --- | {' | '.join('--:' for _ in sides)} |"]
    for (_, task, metric), by_side in rows.items():
        figure = next(iter(by_side.values()))
        notes = [f"windows of {figure['seq_len']}"] if metric == "perplexity" else [f"n={figure['n']}"]
        notes += (
            [f"{figure['num_fewshot']}-shot"]
            if figure.get("num_fewshot") is not None and metric != "perplexity"
            else []
        )
        cells = [_value_text(by_side.get(side)) for side in sides]
        lines.append(f"| {task}, {metric} ({', '.join(notes)}) | {' | '.join(cells)} |")
    return [*lines, ""]


def _value_text(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    spread = f" ± {row['stderr']:.3f}" if row.get("stderr") else ""
    return f"{row['value']:.2f}" if row["metric"] == "perplexity" else f"{row['value']:.3f}{spread}"
