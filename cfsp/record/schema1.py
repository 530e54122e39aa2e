"""Upgrade of records of schema 1, which named components by the paths of their classes; these have moved since.

A record that is read is brought to today's schema. Names change, no figure does, and the commit that measured is kept.
"""

from __future__ import annotations

from typing import Any

from cfsp.config.components import component_name
from cfsp.config.identity import digest

#: Module of a component in records of schema 1 -> its module today.
_MOVED = {
    "cfsp.allocate.chosen_blocks": "cfsp.allocator.chosen_blocks",
    "cfsp.allocate.coarse": "cfsp.allocator.coarse",
    "cfsp.allocate.global_rank": "cfsp.allocator.global_rank",
    "cfsp.allocate.reconstruction": "cfsp.allocator.reconstruction",
    "cfsp.allocate.search": "cfsp.allocator.search",
    "cfsp.allocate.uniform": "cfsp.allocator.uniform",
    "cfsp.evaluate.cost": "cfsp.evaluation.cost",
    "cfsp.evaluate.perplexity": "cfsp.evaluation.perplexity",
    "cfsp.evaluate.zero_shot": "cfsp.evaluation.zero_shot",
    "cfsp.pruning.block_pruner": "cfsp.pruner.block_pruner",
    "cfsp.pruning.dense": "cfsp.pruner.dense",
    "cfsp.pruning.depth": "cfsp.pruner.depth",
    "cfsp.pruning.one_shot": "cfsp.pruner.one_shot",
    "cfsp.pruning.two_ssp": "cfsp.pruner.two_ssp",
    "cfsp.record.logger": "cfsp.logger.base",
    "cfsp.record.wandb_logger": "cfsp.logger.wandb",
    "cfsp.recover.full": "cfsp.recovery.full",
    "cfsp.recover.lora": "cfsp.recovery.lora",
    "cfsp.recover.none": "cfsp.recovery.none",
    "cfsp.recover.settings": "cfsp.recovery.settings",
    "cfsp.sweep.cluster": "cfsp.launcher.cluster",
    "cfsp.sweep.launch": "cfsp.launcher.launch",
    "cfsp.sweep.slurm": "cfsp.launcher.slurm",
}


def upgrade_schema1(values: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a record of schema 1 in the layout of schema 2.

    Args:
        values: the record as it was read; it is not changed.
    """
    changed = {**values, "schema": 2}
    if isinstance(values.get("configuration"), dict):
        changed["configuration"] = _moved_targets(values["configuration"])
    for part in ("identity", "method"):
        if isinstance(values.get(part), dict):
            changed[part] = _name_components(values[part])
    old_id, identity = values.get("run_id"), values.get("identity")
    if isinstance(old_id, str) and isinstance(identity, dict):
        slug, _, ending = old_id.rpartition("-")
        if ending == digest(identity)[:12]:
            changed["run_id"] = f"{slug}-{digest(changed['identity'])[:12]}"
    return changed


def _moved_targets(value: Any) -> Any:
    """Replace the paths of classes that have moved, at any depth of a configuration."""
    if isinstance(value, dict):
        return {
            key: _current_target(inner) if key == "_target_" and isinstance(inner, str) else _moved_targets(inner)
            for key, inner in value.items()
        }
    return [_moved_targets(inner) for inner in value] if isinstance(value, list) else value


def _current_target(target: str) -> str:
    module, _, name = target.rpartition(".")
    return f"{_MOVED[module]}.{name}" if module in _MOVED else target


def _name_components(value: Any) -> Any:
    """Replace the class of a component of cfsp by its name, at any depth of an identity."""
    if isinstance(value, dict):
        name = component_name(value["class"]) if isinstance(value.get("class"), str) else None
        kept = {key: _name_components(inner) for key, inner in value.items() if name is None or key != "class"}
        return kept if name is None else {"component": name, **kept}
    return [_name_components(inner) for inner in value] if isinstance(value, list) else value
