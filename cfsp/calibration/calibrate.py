"""The calibration stage: the statistics of one forward pass over a calibration set, cached on disk by content."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from cfsp.calibration.block_pass import Visit, block_by_block
from cfsp.calibration.calibration_set import CalibrationSet
from cfsp.calibration.collectors import COLLECTOR_VERSION, collecting, report
from cfsp.calibration.expert_collectors import EXPERTS_VERSION
from cfsp.calibration.gram import gram_sums
from cfsp.calibration.gram_store import GramCollection
from cfsp.calibration.statistics import Statistics
from cfsp.calibration.statistics_cache import StatisticsCache
from cfsp.model.driver import BlockDriver
from cfsp.system.cache import read_or_compute


def calibrate(
    driver: BlockDriver,
    calibration: CalibrationSet,
    cache: StatisticsCache | None = None,
    visit: Visit | None = None,
    grams: GramCollection | None = None,
) -> tuple[Statistics, bool]:
    """Collect the statistics of one pass over the calibration set, or read them from the cache.

    The pass sees each token of ``calibration`` exactly once in every block, and never the LM head.

    Args:
        cache: where statistics are kept for other runs; None: nowhere.
        visit: called with each block of a streamed model and its statistics, while its weights are in memory.
        grams: matrices to be collected in the same pass. If the cache has the statistics but not all matrices, a
            separate pass collects the matrices.

    Returns:
        The statistics, and whether nothing had to be computed.
    """
    # Mixtures of experts have a separate version, so that cached statistics of dense models stay valid.
    version = COLLECTOR_VERSION + (1000 * EXPERTS_VERSION if driver.view.mixtures else 0)
    header = {"name": calibration.name, "collectors": version}
    path = None if cache is None else cache.path("statistics", driver, calibration, version)
    progress = None if path is None else path.with_suffix(".progress")
    statistics, cached = read_or_compute(
        path,
        Statistics.load,
        lambda: _one_pass(driver, calibration.input_ids, progress, visit, grams),
        lambda computed, file: computed.save(file, header),
    )
    if grams is not None and not grams.complete:
        with grams.alone():
            if not grams.complete:
                _one_pass(driver, calibration.input_ids, None, visit, grams)
                cached = False
    return statistics, cached


def _one_pass(
    driver: BlockDriver, input_ids: Tensor, progress: Path | None, visit: Visit | None, grams: GramCollection | None
) -> Statistics:
    """Run the decoder once over ids [n, T]: whole batches, or block by block if the weights are streamed.

    Args:
        progress: folder for the state of a pass block by block, removed at its end; None: no state is kept.
    """
    if driver.view.weights.is_streamed or (grams is not None and not grams.fits):
        return block_by_block(driver, input_ids, progress, visit, grams)
    with (
        collecting(driver.view.blocks) as sums,
        gram_sums(driver.view.blocks, None if grams is None else grams.request) as matrices,
    ):
        driver.run(input_ids)
    if grams is not None:
        grams.keep(matrices)
    return report(sums, *input_ids.shape)
