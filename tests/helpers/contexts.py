"""What a pruner is given to plan with, on four short windows of a tiny model."""

from __future__ import annotations

from cfsp.architecture.views import resolve
from cfsp.calibration.calibrate import calibrate
from cfsp.calibration.calibration_set import CalibrationSet
from cfsp.model.driver import BlockDriver
from cfsp.pruner.context import PlanContext
from tests.helpers.tiny import tokens

IDS = tokens(4, 24)


def context_of(model, budget, cache=None) -> PlanContext:
    driver = BlockDriver(resolve(model), 2)
    calibration = CalibrationSet(IDS, "random", "", 0)
    statistics, _ = calibrate(driver, calibration)
    return PlanContext(driver, calibration, statistics, budget, None, None, {"name": "test"}, "m", "f", cache)
