"""An evaluator that adds up weights, and one that lacks the measurement which it promises."""

from __future__ import annotations

from typing import ClassVar

from cfsp.components import component
from cfsp.evaluation.measurement import Measurement


@component
class WeightSum:
    side_by_side: ClassVar[bool] = False

    def check(self, tokenizer, limits):
        return {}

    def measure(self, model, tokenizer):
        total = sum(
            float(p.detach().double().sum()) for n, p in model.named_parameters() if n.endswith("down_proj.weight")
        )
        return [Measurement("outside", "weights", "sum", total, "sum")]


@component
class Promises(WeightSum):
    side_by_side: ClassVar[bool] = True
