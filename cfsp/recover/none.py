"""No recovery: the pruned weights stay as they are."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from cfsp.components import component


@component
class NoRecovery:
    """Returns the model untouched."""

    name: str = "none"
    trains: ClassVar[bool] = False

    def recover(self, model: nn.Module) -> nn.Module:
        return model
