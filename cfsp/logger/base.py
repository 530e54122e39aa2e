"""Logger interface, and the logger that does nothing."""

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
    """Logger that does nothing."""

    def start(self, run_id: str, folder: Path, configuration: dict[str, Any]) -> None:
        """Do nothing."""

    def log(self, values: dict[str, Any]) -> None:
        """Do nothing."""

    def finish(self, record: RunRecord, folder: Path) -> None:
        """Do nothing."""

    def files(self, name: str, folder: Path, files: Mapping[str, Path]) -> None:
        """Do nothing."""
