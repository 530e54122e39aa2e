"""The calibration stage as a pruner needs it: statistics, and what the metric requires beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsp.calibrate.cache import StatisticsCache
from cfsp.calibrate.calibrate import calibrate
from cfsp.identity import method_of
from cfsp.importance.base import required, score_block
from cfsp.pruning.base import PlanContext

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.allocate.budget import Structure
    from cfsp.calibrate.statistics import BlockStatistics
    from cfsp.config import RunConfig
    from cfsp.data.calibration import CalibrationSet
    from cfsp.models.driver import BlockDriver
    from cfsp.models.views import BlockView


def plan_context(
    config: RunConfig,
    driver: BlockDriver,
    calibration: CalibrationSet,
    *,
    base_model: str,
    base_fingerprint: str,
    cache: StatisticsCache | None = None,
) -> tuple[PlanContext, bool]:
    """Calibrate, or read what an earlier run left; returns (context, everything cached?)."""
    importance, gradients = config.importance.instance, None
    structure: Structure | None = getattr(config.pruner.instance, "structure", None)
    scored: dict[int, tuple[Tensor, Tensor]] = {}

    def visit(block: BlockView, found: BlockStatistics) -> None:
        if structure is not None and "importance" in config.plans_with and not required(importance):
            scored[block.index] = score_block(block, found, importance, structure)

    statistics, cached = calibrate(driver, calibration, cache, visit)
    if "gradients" in required(importance) and "importance" in config.plans_with:
        from cfsp.calibrate.gradients import gradient_terms

        checkpointing = hasattr(importance, "gradient_checkpointing") and importance.gradient_checkpointing
        gradients, found = gradient_terms(driver, calibration, cache, checkpointing=checkpointing)
        cached = cached and found
    context = PlanContext(
        driver=driver,
        calibration=calibration,
        statistics=statistics,
        budget=config.budget,
        importance=importance,
        allocator=config.allocator.instance,
        method=method_of(config),
        base_model=base_model,
        base_fingerprint=base_fingerprint,
        cache=cache,
        gradients=gradients,
        scored=scored,
    )
    return context, cached
