"""No pruning: the dense run, and the evaluation of a folder as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from cfsp.config.components import component
from cfsp.config.contracts import Pruner, Unit
from cfsp.plan.pruning_plan import BlockPlan

if TYPE_CHECKING:
    from cfsp.architecture.views import DecoderView
    from cfsp.config.budget import Budget
    from cfsp.plan.pruning_plan import PruningPlan
    from cfsp.pruner.base import PlanContext


@component
class Dense(Pruner):
    """Keep the whole model; such a run neither calibrates nor writes a model."""

    name: str = "none"

    prunes: ClassVar[bool] = False

    def check(self, view: DecoderView, budget: Budget) -> None:
        """Refuse nothing."""

    def removed_units(self) -> tuple[Unit, ...]:
        return ()

    def plan(self, context: PlanContext) -> PruningPlan:
        """Return the plan that keeps everything."""
        # Start-up time: loads torch.
        from cfsp.pruner.build_plan import complete

        return complete(context, [BlockPlan() for _ in context.driver.view.blocks])
