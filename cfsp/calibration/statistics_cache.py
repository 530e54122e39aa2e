"""Cache on disk, by content, of the results of a calibration pass: statistics, gradient terms, similarities."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from cfsp.calibration.calibration_set import CalibrationSet
from cfsp.model.driver import BlockDriver


@dataclass(frozen=True)
class StatisticsCache:
    """Cache whose keys are the content of model and tokens, the dtype, and the version of the collector."""

    folder: Path
    model_fingerprint: str

    def path(
        self, kind: str, driver: BlockDriver, calibration: CalibrationSet, version: int, *, batched: bool = True
    ) -> Path:
        """Return the file of a ``kind`` of result; ``batched`` adds the batch size to the key, which changes sums."""
        key = {
            "model": self.model_fingerprint,
            "tokens": calibration.fingerprint,
            "dtype": str(driver.view.model.dtype),
            "batch_size": driver.batch_size if batched else None,
            "version": version,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / kind / f"{digest[:32]}.safetensors"
