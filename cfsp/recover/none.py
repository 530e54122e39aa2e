"""No recovery: the pruned weights stay as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from cfsp.components import component

if TYPE_CHECKING:
    from torch import nn


@component
class NoRecovery:
    """Returns the model untouched."""

    name: ClassVar[str] = "none"
    trains: ClassVar[bool] = False

    def recover(self, model: nn.Module) -> nn.Module:
        return model
