"""Run identity: a hash of everything that decides the figures.

Contents of models and data are part of it. Locations, device, logger and paths are not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from cfsp.config.components import known_class
from cfsp.config.run_config import RunConfig
from cfsp.errors import ConfigError
from cfsp.system.names import is_name

#: Version of the methods. Raise it when a change of their code changes a result, so that old records no longer match.
METHOD_VERSION = 2


def method_of(config: RunConfig) -> dict[str, Any]:
    """Return the pruner with its settings, and the metric and the allocator if the pruner uses them."""
    pruner = config.pruner
    if not pruner.instance.prunes:
        return {"name": pruner.instance.name}
    parts = {"importance": config.importance, "allocator": config.allocator}
    return {
        "name": pruner.instance.name,
        **{group: parts[group].identity() for group in config.plans_with},
        "pruner": without_unused(pruner.target, pruner.identity()),
        "version": METHOD_VERSION,
    }


def without_unused(target: str, pruner: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pruner's settings without those that have no effect beside the others.

    Args:
        target: ``_target_`` of the pruner. Settings of a class that this process does not know are not changed.
        pruner: settings of the pruner, current or from an earlier record.
    """
    cls = known_class(target)
    unused = cls.unused_settings(pruner) if cls is not None and hasattr(cls, "unused_settings") else ()
    return {key: value for key, value in pruner.items() if key not in unused}


def identity_of(
    config: RunConfig,
    *,
    model: str,
    dtype: str,
    stored_dtype: str,
    calibration: dict[str, Any] | None,
    recovery: dict[str, Any],
    evaluation: dict[str, Any],
) -> dict[str, Any]:
    """Return everything that decides the figures of a run.

    Args:
        config: checked configuration of the run.
        model: fingerprint of the model's content.
        dtype: resolved dtype, never ``auto``.
        stored_dtype: dtype of the checkpoint; the pruned weights are rounded to it before they are evaluated.
        calibration: content and settings of the calibration set; None if nothing is pruned.
        recovery: content of the recovery data and settings of the recovery.
        evaluation: name of each evaluator -> the facts of its inputs and settings that decide its figures.
    """
    pruning = None
    if config.pruner.instance.prunes:
        pruning = {
            "method": method_of(config),
            "sparsity": config.sparsity.model_dump(),
            "calibration": calibration,
            # The same for every format: an export is derived from the saved model and changes no figure of the run.
            "stored": {"dtype": stored_dtype, "format": "hf"},
        }
    # Present only if requested, so that records from before this key existed keep their identity.
    selection = {"evaluate_selection": True} if config.evaluate_selection else {}
    return {
        **selection,
        "version": METHOD_VERSION,
        "model": model,
        "dtype": dtype,
        "seed": config.seed,
        "pruning": pruning,
        "recovery": recovery,
        "evaluation": evaluation,
    }


def run_id_of(config: RunConfig, identity: dict[str, Any]) -> str:
    """Return the run id: a readable slug and 12 hexadecimal digits of the identity's hash.

    Raises:
        ConfigError: the names in the slug are too long.
    """
    name = config.pruner.instance.name
    slug = [config.model.name, name if config.pruner.instance.prunes else "dense"]
    if config.pruner.instance.prunes:
        slug.append(f"{config.sparsity.ratio:g}")
        if config.recovery.instance.trains:
            slug.append(config.recovery.instance.name)
    run_id = f"{'-'.join(slug)}-{digest(identity)[:12]}"
    if not is_name(run_id):
        key = "model.name" if len(config.model.name) >= len(name) else "pruner.name"
        raise ConfigError(
            f"{key}={max(config.model.name, name, key=len)}: the run's id has {len(run_id)} characters with it, at "
            "most 100 fit into the name of a folder; give a shorter name"
        )
    return run_id


def digest(value: Any) -> str:
    """Return the sha256 of a value's canonical JSON in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
