"""The logger interface: a mirror of the record. The null logger stands where none is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.config.components import component
from cfsp.config.contracts import RunLogger

if TYPE_CHECKING:
    from cfsp.record.run_record import RunRecord

__all__ = ["NullLogger", "RunLogger"]


@component
class NullLogger(RunLogger):
    """Logs nowhere."""

    def start(self, run_id: str, folder: Path, configuration: dict[str, Any]) -> None:
        """Nothing to start."""

    def log(self, values: dict[str, Any]) -> None:
        """Nothing to log to."""

    def finish(self, record: RunRecord, folder: Path) -> None:
        """Nothing to finish."""

    def files(self, name: str, folder: Path, files: Mapping[str, Path]) -> None:
        """Nothing to keep them in."""
