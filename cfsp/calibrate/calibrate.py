"""The calibration stage: model, calibration set -> Statistics; one forward pass, cached on disk by content."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from cfsp.calibrate.collectors import COLLECTOR_VERSION, collecting, report
from cfsp.calibrate.statistics import Statistics
from cfsp.data.calibration import CalibrationSet
from cfsp.models.driver import BlockDriver

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StatisticsCache:
    """Statistics by the content of model and tokens, dtype, batch size and collector version."""

    folder: Path
    model_fingerprint: str

    def path(self, driver: BlockDriver, calibration: CalibrationSet) -> Path:
        key = {
            "model": self.model_fingerprint,
            "tokens": calibration.fingerprint,
            "dtype": str(driver.view.model.dtype),
            "batch_size": driver.batch_size,
            "collectors": COLLECTOR_VERSION,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / "statistics" / f"{digest[:32]}.safetensors"


def calibrate(
    driver: BlockDriver, calibration: CalibrationSet, cache: StatisticsCache | None = None
) -> tuple[Statistics, bool]:
    """Run the decoder once over the set, or read what an earlier run left; returns (statistics, cached?).

    The pass sees each token of ``calibration`` exactly once in every block, and never the LM head.
    """
    path = None if cache is None else cache.path(driver, calibration)
    if path is not None and path.is_file():
        try:
            return Statistics.load(path), True
        except Exception as error:  # any damage: the file can be made again
            log.warning("cached statistics %s cannot be read (%s); calibrating again", path.name, error)
    n_sequences, seq_len = calibration.input_ids.shape
    with collecting(driver.view.blocks) as sums:
        driver.run(calibration.input_ids)
    statistics = report(sums, n_sequences, seq_len)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.stem}.{os.getpid()}.partial")
        statistics.save(partial, {"name": calibration.name, "collectors": COLLECTOR_VERSION})
        os.replace(partial, path)
    return statistics, False
