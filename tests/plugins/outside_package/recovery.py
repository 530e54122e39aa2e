"""A recovery that scales the output of every FFN."""

from __future__ import annotations

from typing import ClassVar

from cfsp.components import component
from cfsp.recovery.base import Recovered


@component
class Scale:
    factor: float = 1.5
    name: str = "scale"
    trains: ClassVar[bool] = True

    def check(self, view, tokenizer, limits, device):
        return {"factor": self.factor}

    def recover(self, context):
        for name, parameter in context.model.named_parameters():
            if name.endswith("down_proj.weight"):
                parameter.data.mul_(self.factor)
        return Recovered(context.model, {"name": self.name, "factor": self.factor})
