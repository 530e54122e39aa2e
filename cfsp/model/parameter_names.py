"""Names of a model's parameters in its modules and in a checkpoint."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from cfsp.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

    from cfsp.weights.shards import Shards


def stored_names(model: Any, shards: Shards, merged: Collection[str] = ()) -> dict[str, str]:
    """Map names of parameters in the model to names of tensors in the checkpoint.

    All names of a tied parameter map to the stored one.

    Args:
        model: the model, which may be on the meta device.
        shards: the checkpoint.
        merged: names of parameters that are left out, because they are built from several stored tensors.

    Raises:
        CheckpointError: a weight is missing.
    """
    same: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same.setdefault(id(parameter), []).append(name)
    stored_by_name: dict[str, str] = {}
    for names in same.values():
        stored = [name for name in names if name in shards]
        if not stored and names[0] in merged:
            continue
        if not stored:
            raise CheckpointError(
                f"{shards.folder}: {names[0]} is not in the safetensors files under the model's own name; use "
                "model.streaming=off, or fetch the model again"
            )
        stored_by_name.update(dict.fromkeys(names, stored[0]))
    return stored_by_name


def parameter_places(module: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """Return (module, attribute, dotted name within ``module``) of every parameter."""
    return [
        (child, name, f"{prefix}.{name}" if prefix else name)
        for prefix, child in module.named_modules()
        for name, parameter in child._parameters.items()
        if parameter is not None
    ]
