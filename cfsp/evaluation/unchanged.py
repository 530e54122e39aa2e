"""An evaluation leaves the model that it measures as it is: values, what is tied, configuration.

lm-eval, for one, ties the weights of the very model that it is given, so its figures and all later ones may be another
model's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cfsp.errors import RunError

_T = TypeVar("_T")
#: A tensor is summed as a matrix of 64-bit words with rows of this length.
_ROW = 2048


@dataclass(frozen=True)
class ModelState:
    """A model's content as checksums.

    values: checksum of each parameter and persistent buffer by name; tied: names that share one parameter, by its first
    name; config: configuration as JSON. Parameters without data (a streamed model's) are compared by shape.
    """

    values: dict[str, str] = field(repr=False)
    tied: dict[str, tuple[str, ...]] = field(repr=False)
    config: str = field(repr=False)

    def difference(self, later: ModelState) -> str | None:
        """What is not as it was, in a clause; None where nothing changed."""
        if self.tied != later.tied:
            return f"ties or unties {_first(self.tied, later.tied)}"
        if self.values != later.values:
            return f"changes the values of {_first(self.values, later.values)}"
        if self.config != later.config:
            before, after = json.loads(self.config), json.loads(later.config)
            return f"changes {_first(before, after)} in the model's configuration"
        return None


def state_of(model: nn.Module) -> ModelState:
    """Read the whole model once, at the speed of its memory."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    tied = {names[0]: tuple(names) for names in groups.values() if len(names) > 1}
    seen = {name for names in tied.values() for name in names[1:]}
    values = {name: _checksum(tensor.detach()) for name, tensor in model.state_dict().items() if name not in seen}
    settings: Any = getattr(model, "config", None)
    config: dict[str, Any] = settings.to_dict() if hasattr(settings, "to_dict") else {}
    stated = {key: value for key, value in config.items() if not key.startswith("_")}
    return ModelState(values, tied, json.dumps(stated, sort_keys=True, default=str))


def measured_unchanged(name: str, model: nn.Module, measure: Callable[[], _T]) -> _T:
    """Return what ``measure`` gives of ``model``.

    Args:
        name: the evaluator, for the message.

    Raises:
        RunError: the model is not what it was before.
    """
    before = state_of(model)
    found = measure()
    changed = before.difference(state_of(model))
    if changed is not None:
        raise RunError(
            f"evaluation={name}: the evaluator {changed} of the model that it measures, so this figure and later ones "
            "would be another model's; have it work on a copy"
        )
    return found


def _checksum(tensor: Tensor) -> str:
    label = f"{tensor.dtype} {tuple(tensor.shape)} "
    if tensor.is_meta or not tensor.numel():
        return label
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:  # 64-bit words begin at multiples of 8 bytes
        data = data.clone()
    words = data[: len(data) // 8 * 8].view(torch.int64)
    whole = len(words) // _ROW * _ROW
    rows = words[:whole].view(-1, _ROW)
    # Sums of rows and of columns, each times its place: no temporary of the tensor's size, and places count.
    sums = [_weighted(part) for part in (rows.sum(1), rows.sum(0), words[whole:])]
    return label + f"{sums} {data[len(words) * 8 :].tolist()}"


def _weighted(values: Tensor) -> int:
    return int((values * torch.arange(1, len(values) + 1, device=values.device)).sum())


def _first(before: dict[str, Any], after: dict[str, Any]) -> str:
    return next(key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key))
