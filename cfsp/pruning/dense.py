"""No pruning: the dense run, and the evaluation of a folder as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from cfsp.components import component
from cfsp.pruning.plan import BlockPlan, PruningPlan

if TYPE_CHECKING:
    from cfsp.pruning.base import PlanContext


@component
class Dense:
    """Keeps everything; a run with it neither calibrates nor writes a model."""

    name: str = "none"

    needs_model: ClassVar[bool] = False
    prunes: ClassVar[bool] = False

    def plan(self, context: PlanContext) -> PruningPlan:
        from cfsp.models.sample import weight_sample

        blocks = tuple(BlockPlan() for _ in context.driver.view.blocks)
        count = context.driver.view.model_parameters
        return PruningPlan(
            context.base_model,
            context.base_fingerprint,
            context.method,
            blocks,
            requested={"ratio": 0.0},
            achieved={"ratio": 0.0, "removed_parameters": 0},
            parameters={"before": count, "after": count},
            base_sample=weight_sample(context.driver.view),
        )
