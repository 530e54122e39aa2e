"""Run identity: a hash of what decides the result. Contents go in; locations, device, logger and paths stay out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from cfsp.config.components import known_class
from cfsp.config.run_config import RunConfig
from cfsp.errors import ConfigError
from cfsp.system.names import is_name

#: Raise it when the method's code changes a result, so that no old record stands for the new code.
METHOD_VERSION = 2


def method_of(config: RunConfig) -> dict[str, Any]:
    """What really runs: the pruner with its settings, and the metric and allocator where it uses them."""
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
    """Return a pruner's settings without those that decide nothing beside the others.

    Args:
        target: ``_target_`` of the pruner. Settings of a class that this process does not know stay as they are.
        pruner: its settings, of today or from an earlier record.
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
    """Everything that decides the figures of a run.

    Args:
        model: the model's content fingerprint.
        dtype: as resolved, never ``auto``.
        stored_dtype: of the checkpoint; the pruned weights are rounded to it before they are evaluated.
        calibration: by content; None where nothing is pruned.
        recovery: by content and settings.
        evaluation: evaluator name -> what of its inputs and settings decides the figures.
    """
    pruning = None
    if config.pruner.instance.prunes:
        pruning = {
            "method": method_of(config),
            "sparsity": config.sparsity.model_dump(),
            "calibration": calibration,
            # Of every format: an export is made of the saved model and changes no figure of the run.
            "stored": {"dtype": stored_dtype, "format": "hf"},
        }
    # Only where it is asked for: records from before it was there keep their identity.
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
    """Join a readable slug and 12 hexadecimal digits of the identity's hash.

    Raises:
        ConfigError: the names in the slug are too long together.
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
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
