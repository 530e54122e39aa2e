"""The planning context of a pruner, and the units whose removal the numeric check tries first."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cfsp.config.contracts import Pruner

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.calibration.calibration_set import CalibrationSet
    from cfsp.calibration.gradients import GradientTerms
    from cfsp.calibration.gram import GramRequest
    from cfsp.calibration.gram_store import GramMatrices
    from cfsp.calibration.statistics import Statistics
    from cfsp.calibration.statistics_cache import StatisticsCache
    from cfsp.config.budget import Budget
    from cfsp.config.contracts import Allocator, NeuronImportance
    from cfsp.model.driver import BlockDriver


__all__ = ["PlanContext", "Pruner", "removes_experts", "removes_heads"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanContext:
    """Everything that a pruner may use while it plans.

    Attributes:
        driver: runs the model, for methods that measure losses while they plan.
        calibration: the calibration set.
        statistics: statistics of the calibration pass.
        budget: the requested sparsity.
        importance: the metric.
        allocator: the allocation.
        method: the settings that decide the plan, for the plan's file.
        base_model: name of the dense model.
        base_fingerprint: content of the dense model.
        cache: folder for results that take long to compute; None: nothing is kept.
        gradients: gradient terms, where the metric requires them.
        grams: Gram matrices, where the metric or the pruner requires them.
        gram_request: submodules that the Gram matrices cover, and the share of the tokens.
        scored: block index -> scores of blocks of a streamed model, computed while the block was in memory for the
            calibration pass.
    """

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
    gradients: GradientTerms | None = None
    grams: GramMatrices | None = None
    gram_request: GramRequest | None = None
    scored: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


def removes_heads(pruner: Pruner) -> bool:
    """Return whether the pruner may remove KV groups, which the numeric check then tries; log an unstated answer."""
    units = pruner.removed_units()
    if units is None:
        log.warning(
            "removed_units: not stated by this pruner (pruner=%s); the numeric check before it plans tries FFN neurons "
            "alone",
            pruner.name,
        )
    return "kv_groups" in (units or ())


def removes_experts(pruner: Pruner) -> bool:
    """Return whether the pruner may remove whole experts, which the numeric check then tries."""
    return "experts" in (pruner.removed_units() or ())
