"""What a pass over the calibration set left, on disk by content: statistics, gradient terms, similarities."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cfsp.data.calibration import CalibrationSet
from cfsp.lease import waited
from cfsp.models.driver import BlockDriver

log = logging.getLogger(__name__)

Value = TypeVar("Value")


@dataclass(frozen=True)
class StatisticsCache:
    """Files by the content of model and tokens, dtype, and the version of what collected them."""

    folder: Path
    model_fingerprint: str

    def path(
        self, kind: str, driver: BlockDriver, calibration: CalibrationSet, version: int, *, batched: bool = True
    ) -> Path:
        """Where the ``kind`` of this model and set lies; ``batched``: the batch size counts (it moves sums)."""
        key = {
            "model": self.model_fingerprint,
            "tokens": calibration.fingerprint,
            "dtype": str(driver.view.model.dtype),
            "batch_size": driver.batch_size if batched else None,
            "version": version,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / kind / f"{digest[:32]}.safetensors"


def read_or_compute(
    path: Path | None,
    read: Callable[[Path], Value],
    compute: Callable[[], Value],
    write: Callable[[Value, Path], object],
) -> tuple[Value, bool]:
    """The value in ``path``, or a new one, which is then kept there atomically; returns (value, cached?).

    Of several processes that want it at the same time one computes it, the others wait and read. ``path`` None: nothing
    is kept. A file that cannot be read is made again.
    """
    if path is None:
        return compute(), False
    found = _kept(path, read)
    if found:
        return found[0], True
    kind = path.parent.name
    with waited(path.with_name(f".{path.stem}.lease"), lambda who: log.info("waiting for %s (%s)", kind, who)):
        found = _kept(path, read, quiet=True)
        if found:
            return found[0], True
        value = compute()
        partial = path.with_name(f"{path.stem}.{os.getpid()}.partial")
        write(value, partial)
        os.replace(partial, path)
    return value, False


def _kept(path: Path, read: Callable[[Path], Value], *, quiet: bool = False) -> tuple[Value] | None:
    if not path.is_file():
        return None
    try:
        return (read(path),)
    except Exception as error:  # any damage: the file can be made again
        if not quiet:
            log.warning("cached %s %s cannot be read (%s); computing it again", path.parent.name, path.name, error)
        return None
