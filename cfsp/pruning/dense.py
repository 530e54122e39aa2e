"""No pruning: the dense run, and the evaluation of a folder as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from cfsp.components import component
from cfsp.contracts import Pruner, Unit
from cfsp.pruning.plan import BlockPlan

if TYPE_CHECKING:
    from cfsp.allocate.budget import Budget
    from cfsp.models.views import DecoderView
    from cfsp.pruning.base import PlanContext
    from cfsp.pruning.plan import PruningPlan


@component
class Dense(Pruner):
    """Keeps everything; a run with it neither calibrates nor writes a model."""

    name: str = "none"

    prunes: ClassVar[bool] = False

    def check(self, view: DecoderView, budget: Budget) -> None:
        """Refuse nothing."""

    def removed_units(self) -> tuple[Unit, ...]:
        return ()

    def plan(self, context: PlanContext) -> PruningPlan:
        """Return the plan that keeps everything."""
        from cfsp.pruning.complete import complete

        return complete(context, [BlockPlan() for _ in context.driver.view.blocks])
