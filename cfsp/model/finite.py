"""Check of a model for NaN and infinite values, and rounding of its weights to the dtype of a checkpoint."""

from __future__ import annotations

import torch
from torch import nn

from cfsp.architecture.weights import weights_of
from cfsp.errors import RunError


def first_non_finite(model: nn.Module) -> str | None:
    """Return the name of the first parameter that holds a NaN or an infinity; None where there is none."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel():
            # aminmax returns NaN if any value is NaN. It cannot overflow like a sum, and needs no mask of this size.
            low, high = torch.aminmax(parameter.detach())
            if not (torch.isfinite(low) and torch.isfinite(high)):
                return name
    return None


def round_to_stored(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights to the values that a checkpoint of ``dtype`` holds.

    So the saved folder gives the same measurements as the run.

    Raises:
        RunError: a weight does not fit into the dtype.
    """
    name = first_non_finite(model) if weights_of(model).round_to(dtype) else None
    if name is not None:
        raise RunError(f"{name} does not fit into {dtype}; use save.dtype=bfloat16 or float32")
