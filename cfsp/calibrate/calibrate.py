"""The calibration stage: model, calibration set -> Statistics; one forward pass, cached on disk by content."""

from __future__ import annotations

from cfsp.calibrate.cache import StatisticsCache, read_or_compute
from cfsp.calibrate.collectors import COLLECTOR_VERSION, collecting, report
from cfsp.calibrate.expert_collectors import EXPERTS_VERSION
from cfsp.calibrate.gram import GramCollection, gram_sums
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
    grams: GramCollection | None = None,
) -> tuple[Statistics, bool]:
    """Run the decoder once over the set, or read what an earlier run left; returns (statistics, cached?).

    ``grams``: matrices to be collected on the way; where statistics are there and some of these are not, in a pass of
    their own.

    ``visit`` is called with each block of a streamed model while its weights are in memory, with its statistics.

    The pass sees each token of ``calibration`` exactly once in every block, and never the LM head.
    """

    def compute() -> Statistics:
        if streamed(driver.view.model) is not None or (grams is not None and not grams.fits):
            kept = None if path is None else path.with_suffix(".progress")
            return block_by_block(driver, calibration.input_ids, kept, visit, grams)
        with (
            collecting(driver.view.blocks) as sums,
            gram_sums(driver.view.blocks, None if grams is None else grams.wanted) as matrices,
        ):
            driver.run(calibration.input_ids)
        if grams is not None:
            grams.keep(matrices)
        return report(sums, *calibration.input_ids.shape)

    # Mixtures of experts have a version of their own, beside which what was kept of dense models stays valid.
    version = COLLECTOR_VERSION + (1000 * EXPERTS_VERSION if driver.view.mixtures else 0)
    header = {"name": calibration.name, "collectors": version}
    path = None if cache is None else cache.path("statistics", driver, calibration, version)
    found, cached = read_or_compute(path, Statistics.load, compute, lambda found, file: found.save(file, header))
    if grams is not None and not grams.complete:
        with grams.alone():
            if not grams.complete:
                path, cached = None, False
                compute()
    return found, cached
