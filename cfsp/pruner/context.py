"""Preparing the planning context: calibration, and the gradients or Gram matrices that metric and pruner require."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cfsp.calibration.calibrate import calibrate
from cfsp.calibration.gradients import gradient_terms
from cfsp.calibration.gram import GRAM_VERSION, GramRequest, HeldOutRows, HoldOut
from cfsp.calibration.gram_store import GramCollection
from cfsp.calibration.statistics_cache import StatisticsCache
from cfsp.config.identity import method_of
from cfsp.errors import ConfigError
from cfsp.importance.base import required_items, score_block
from cfsp.pruner.base import PlanContext
from cfsp.sparsity.budget import removable_submodules
from cfsp.system.memory import available

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.views import BlockView, DecoderView
    from cfsp.calibration.calibration_set import CalibrationSet
    from cfsp.calibration.statistics import BlockStatistics
    from cfsp.config.budget import Structure
    from cfsp.config.run_config import RunConfig
    from cfsp.model.driver import BlockDriver


def plan_context(
    config: RunConfig,
    driver: BlockDriver,
    calibration: CalibrationSet,
    *,
    base_model: str,
    base_fingerprint: str,
    cache: StatisticsCache | None = None,
) -> tuple[PlanContext, bool]:
    """Collect everything that the pruner needs for planning, or read it from the cache.

    Returns:
        The context, and whether everything came from the cache.
    """
    pruner, importance, gradients = config.pruner.instance, config.importance.instance, None
    pruner.check_choices(driver.view, config.importance, config.allocator)
    structure = pruner.structure
    scored: dict[int, tuple[Tensor, Tensor]] = {}

    def visit(block: BlockView, statistics_of_block: BlockStatistics) -> None:
        if structure is not None and "importance" in config.plans_with and not required_items(importance):
            scored[block.index] = score_block(block, statistics_of_block, importance, structure)

    gram_request = _gram_request(config, structure, driver.view, len(calibration.input_ids))
    grams = (
        None
        if gram_request is None
        else GramCollection(driver.view.blocks, gram_request, _gram_folder(driver, calibration, gram_request, cache))
    )
    statistics, cached = calibrate(driver, calibration, cache, visit, grams)
    if "gradients" in required_items(importance) and "importance" in config.plans_with:
        gradients, gradients_cached = gradient_terms(
            driver, calibration, cache, checkpointing=importance.gradient_checkpointing
        )
        cached = cached and gradients_cached
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
        grams=None if grams is None else grams.matrices,
        gram_request=gram_request,
        scored=scored,
    )
    return context, cached


def _hold_out(requirements: Sequence[str], sequences: int) -> HoldOut:
    return HeldOutRows.among(sequences).unit if "held_out" in requirements else "nothing"


def _gram_request(
    config: RunConfig, structure: Structure | None, view: DecoderView, sequences: int
) -> GramRequest | None:
    """Return the Gram matrices that metric or pruner require, of the submodules that may lose units; None: none.

    Raises:
        ConfigError: the pruner does not state its structure, so the required matrices are unknown.
    """
    requirements = [*(required_items(config.importance.instance) if "importance" in config.plans_with else ())]
    requirements += config.pruner.instance.requires
    if "gram" not in requirements:
        return None
    if structure is None:
        raise ConfigError(
            f"pruner._target_={config.pruner.target}: Gram matrices are required, and structure is not stated by this "
            "pruner, so that nobody knows of which projections; state it, or use a metric without them "
            "(importance=cfsp, wanda, flap)"
        )
    kinds, hold_out = removable_submodules(structure), _hold_out(requirements, sequences)
    memory = getattr(config.calibration, "memory_gb", None)
    limit = available(torch.device("cpu")) // 2 if memory is None else int(memory * 1e9)
    if view.device.type != "cpu":  # In one pass over the whole model, the sums are held on the device of the weights.
        limit = min(limit, available(view.device) // 2)
    return GramRequest(kinds, config.calibration.gram_share, limit, hold_out)


def _gram_folder(
    driver: BlockDriver, calibration: CalibrationSet, gram_request: GramRequest, cache: StatisticsCache | None
) -> Path | None:
    if cache is None:
        return None
    place = cache.path("gram", driver, calibration, GRAM_VERSION)
    held_out = "" if gram_request.hold_out == "nothing" else f"-held_out_{gram_request.hold_out}"
    return place.with_name(f"{place.stem}-{gram_request.stride:g}-{'-'.join(gram_request.kinds)}{held_out}")
