"""The calibration stage: model, calibration set -> Statistics; one forward pass, cached on disk by content."""

from __future__ import annotations

from collections.abc import Callable

from cfsp.calibrate.cache import StatisticsCache, read_or_compute
from cfsp.calibrate.collectors import COLLECTOR_VERSION, collecting, report
from cfsp.calibrate.statistics import BlockStatistics, Statistics
from cfsp.data.calibration import CalibrationSet
from cfsp.models.driver import BlockDriver
from cfsp.models.streamed import streamed
from cfsp.models.views import BlockView


def calibrate(
    driver: BlockDriver,
    calibration: CalibrationSet,
    cache: StatisticsCache | None = None,
    visit: Callable[[BlockView, BlockStatistics], None] | None = None,
) -> tuple[Statistics, bool]:
    """Run the decoder once over the set, or read what an earlier run left; returns (statistics, cached?).

    ``visit`` is called with each block of a streamed model while its weights are in memory, with its statistics.

    The pass sees each token of ``calibration`` exactly once in every block, and never the LM head.
    """

    def compute() -> Statistics:
        if streamed(driver.view.model) is not None:
            return _block_by_block(driver, calibration, visit)
        with collecting(driver.view.blocks) as sums:
            driver.run(calibration.input_ids)
        return report(sums, *calibration.input_ids.shape)

    header = {"name": calibration.name, "collectors": COLLECTOR_VERSION}
    path = None if cache is None else cache.path("statistics", driver, calibration, COLLECTOR_VERSION)
    return read_or_compute(path, Statistics.load, compute, lambda found, file: found.save(file, header))


def _block_by_block(
    driver: BlockDriver, calibration: CalibrationSet, visit: Callable[[BlockView, BlockStatistics], None] | None
) -> Statistics:
    ids = calibration.input_ids
    blocks = []
    for step in driver.steps(ids, "calibrate"):
        with collecting([step.block]) as sums:
            step.run()
        blocks.append(sums[0].report(*ids.shape))
        if visit is not None:
            visit(step.block, blocks[-1])
    return Statistics(tuple(blocks), *ids.shape)
