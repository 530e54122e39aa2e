"""Device and dtype of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cfsp.config.sections import DType
from cfsp.errors import ConfigError
from cfsp.system.processes import launched

if TYPE_CHECKING:
    from cfsp.weights.source import ModelSource


def resolve_device(name: str) -> torch.device:
    """Return the device that a setting names.

    Args:
        name: value of ``model.device``. ``auto`` is cuda where there is a GPU, else cpu. With several processes, each
            one takes the GPU of its own local rank.

    Raises:
        ConfigError: the device is unknown, is not usable here, or would be shared by several processes.
    """
    process = launched()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and process.several:
        name = f"cuda:{process.local_rank}"
    elif ":" in name and process.several:
        raise ConfigError(f"model.device={name}: {process.count} processes would share it; use model.device=auto")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"model.device={name}: not usable here ({reason}); use model.device=auto or cpu") from error
    return device


def resolve_dtype(name: DType, device: torch.device, source: ModelSource) -> torch.dtype:
    """Return the dtype that a setting names.

    Args:
        name: value of ``model.dtype``. ``auto`` is float32 on a CPU, where it is fast and exact, and the checkpoint's
            dtype on an accelerator.
        device: device of the model.
        source: model whose stored dtype ``auto`` may take.
    """
    if name != "auto":
        return getattr(torch, name)
    return torch.float32 if device.type == "cpu" else getattr(torch, source.stored_dtype)
