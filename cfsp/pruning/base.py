"""What a pruner is: it turns a planning context into a plan. Weights are never touched while planning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from cfsp.allocate.base import Allocator
    from cfsp.allocate.budget import Budget
    from cfsp.calibrate.calibrate import StatisticsCache
    from cfsp.calibrate.statistics import Statistics
    from cfsp.data.calibration import CalibrationSet
    from cfsp.importance.base import NeuronImportance
    from cfsp.models.driver import BlockDriver
    from cfsp.pruning.plan import PruningPlan


@dataclass(frozen=True)
class PlanContext:
    """Everything a pruner may use. ``driver`` is for methods that must run the model while planning."""

    driver: BlockDriver
    calibration: CalibrationSet
    statistics: Statistics
    budget: Budget
    importance: NeuronImportance
    allocator: Allocator
    method: dict[str, Any]
    base_model: str
    base_fingerprint: str
    cache: StatisticsCache | None = None


class Pruner(Protocol):
    """``needs_model``: planning runs the model through ``context.driver`` beyond the one calibration pass."""

    name: str
    needs_model: ClassVar[bool]
    prunes: ClassVar[bool]

    def plan(self, context: PlanContext) -> PruningPlan:
        """The plan; the model is left as it was."""
        ...
