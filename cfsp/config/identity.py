"""Run identity, and the settings by which tables match runs. Both follow the marks on the configuration fields.

Contents go into the identity; locations, device, logger and paths stay out. See :mod:`cfsp.config.deciding`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from cfsp.config.components import Component, component_name, known_class
from cfsp.config.deciding import Parts, deciding_settings, separate
from cfsp.config.run_config import RunConfig
from cfsp.errors import ConfigError
from cfsp.system.digest import file_digest
from cfsp.system.names import is_name
from cfsp.system.package import package_path

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
        **{group: _with_contents(parts[group]) for group in config.plans_with},
        "pruner": _with_contents(pruner),
        "version": METHOD_VERSION,
    }


def _with_contents(component: Component[Any]) -> dict[str, Any]:
    """Return the identity of a component, with the sha256 of each file that its settings name.

    Other inputs (a folder, an id, None) keep their value.
    """
    contents = {}
    for key, place in separate(type(component.instance), component.settings).places.items():
        is_file = isinstance(place, str) and os.path.isfile(package_path(place))
        contents[key] = file_digest(package_path(place)) if is_file else place
    return component.identity() | contents


def configuration_parts(configuration: Mapping[str, Any]) -> Parts:
    """Separate a configuration, also of an earlier record, into settings that tables match and locations of inputs.

    Reading a record imports no foreign code: settings of a class that this process does not know all count.
    """
    return separate(RunConfig, configuration, lambda target: (known_class(target), component_name(target) or target))


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
            "sparsity": deciding_settings(config.sparsity),
            "calibration": calibration,
            # The same for every format: an export is derived from the saved model and changes no figure of the run.
            "stored": {"dtype": stored_dtype, "format": "hf"},
        }
    scalars = {"evaluate_selection": config.evaluate_selection, "seed": config.seed}
    return {
        **separate(RunConfig, scalars).values,
        "version": METHOD_VERSION,
        "model": model,
        "dtype": dtype,
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
