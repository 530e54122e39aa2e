"""The calibration stage: model, calibration set -> Statistics; one forward pass, cached on disk by content."""

from __future__ import annotations

from cfsp.calibrate.cache import StatisticsCache, read_or_compute
from cfsp.calibrate.collectors import COLLECTOR_VERSION, collecting, report
from cfsp.calibrate.passing import Visit, block_by_block
from cfsp.calibrate.statistics import Statistics
from cfsp.data.calibration import CalibrationSet
from cfsp.models.driver import BlockDriver
from cfsp.models.streamed import streamed


def calibrate(
    driver: BlockDriver,
    calibration: CalibrationSet,
    cache: StatisticsCache | None = None,
    visit: Visit | None = None,
) -> tuple[Statistics, bool]:
    """Run the decoder once over the set, or read what an earlier run left; returns (statistics, cached?).

    ``visit`` is called with each block of a streamed model while its weights are in memory, with its statistics.

    The pass sees each token of ``calibration`` exactly once in every block, and never the LM head.
    """

    def compute() -> Statistics:
        if streamed(driver.view.model) is not None:
            kept = None if path is None else path.with_suffix(".progress")
            return block_by_block(driver, calibration.input_ids, kept, visit)
        with collecting(driver.view.blocks) as sums:
            driver.run(calibration.input_ids)
        return report(sums, *calibration.input_ids.shape)

    header = {"name": calibration.name, "collectors": COLLECTOR_VERSION}
    path = None if cache is None else cache.path("statistics", driver, calibration, COLLECTOR_VERSION)
    return read_or_compute(path, Statistics.load, compute, lambda found, file: found.save(file, header))
