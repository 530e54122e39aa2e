"""Check that an evaluation leaves the model as it is: values, tied parameters and configuration.

lm-eval, for instance, ties the weights of the model that it is given. Its own figures and all later ones may then be
those of another model.
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
    """Checksums of a model's content. Parameters without data (those of a streamed model) are compared by shape.

    Attributes:
        values: checksum of each parameter and persistent buffer, by name.
        tied: names that share a parameter, by its first name.
        config: configuration as JSON.
    """

    values: dict[str, str] = field(repr=False)
    tied: dict[str, tuple[str, ...]] = field(repr=False)
    config: str = field(repr=False)

    def difference(self, later: ModelState) -> str | None:
        """Describe the first difference of a later state in a clause, e.g. "ties or unties NAME"; None: no change."""
        if self.tied != later.tied:
            return f"ties or unties {_first_difference(self.tied, later.tied)}"
        if self.values != later.values:
            return f"changes the values of {_first_difference(self.values, later.values)}"
        if self.config != later.config:
            before, after = json.loads(self.config), json.loads(later.config)
            return f"changes {_first_difference(before, after)} in the model's configuration"
        return None


def compute_state(model: nn.Module) -> ModelState:
    """Compute the checksums of a model, which reads all its weights once."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    tied = {names[0]: tuple(names) for names in groups.values() if len(names) > 1}
    repeated = {name for names in tied.values() for name in names[1:]}
    values = {name: _checksum(tensor.detach()) for name, tensor in model.state_dict().items() if name not in repeated}
    settings: Any = getattr(model, "config", None)
    config: dict[str, Any] = settings.to_dict() if hasattr(settings, "to_dict") else {}
    stated = {key: value for key, value in config.items() if not key.startswith("_")}
    return ModelState(values, tied, json.dumps(stated, sort_keys=True, default=str))


def measure_unchanged(name: str, model: nn.Module, measure: Callable[[], _T]) -> _T:
    """Call ``measure``, check that it left the model unchanged, and return its result.

    Args:
        name: name of the evaluator, for the message.
        model: the model that is measured.
        measure: measures the model.

    Raises:
        RunError: the model has changed.
    """
    before = compute_state(model)
    result = measure()
    difference = before.difference(compute_state(model))
    if difference is not None:
        raise RunError(
            f"evaluation={name}: the evaluator {difference} of the model that it measures, so this figure and later "
            "ones would be another model's; have it work on a copy"
        )
    return result


def _checksum(tensor: Tensor) -> str:
    label = f"{tensor.dtype} {tuple(tensor.shape)} "
    if tensor.is_meta or not tensor.numel():
        return label
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:  # 64-bit words begin at multiples of 8 bytes
        data = data.clone()
    integers = data[: len(data) // 8 * 8].view(torch.int64)
    in_rows = len(integers) // _ROW * _ROW
    rows = integers[:in_rows].view(-1, _ROW)
    # Weighting row and column sums by position notices moved values without a temporary of the tensor's size.
    sums = [_position_weighted_sum(part) for part in (rows.sum(1), rows.sum(0), integers[in_rows:])]
    return label + f"{sums} {data[len(integers) * 8 :].tolist()}"


def _position_weighted_sum(values: Tensor) -> int:
    return int((values * torch.arange(1, len(values) + 1, device=values.device)).sum())


def _first_difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    return next(key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key))
