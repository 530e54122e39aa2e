"""The logger interface: a mirror of the record. The null logger stands where none is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from cfsp.components import component
from cfsp.record.run_record import RunRecord


class RunLogger(Protocol):
    """Started once per run, finished once, whatever happens in between."""

    def start(self, run_id: str, folder: Path, configuration: dict[str, Any]) -> None:
        """A run begins; what is wrong with the logger is said here, before any work."""
        ...

    def log(self, values: dict[str, Any]) -> None:
        """A step of the training."""
        ...

    def finish(self, record: RunRecord, folder: Path) -> None:
        """The run has ended, well or not: ``record`` is what OUT holds of it. May be called again for the same run."""
        ...

    def files(self, name: str, folder: Path, files: Mapping[str, Path]) -> None:
        """What was made from several runs, such as tables: name -> file; ``folder`` is for what the logger writes."""
        ...


@component
class NullLogger:
    """Logs nowhere."""

    def start(self, run_id: str, folder: Path, configuration: dict[str, Any]) -> None:
        """Nothing to start."""

    def log(self, values: dict[str, Any]) -> None:
        """Nothing to log to."""

    def finish(self, record: RunRecord, folder: Path) -> None:
        """Nothing to finish."""

    def files(self, name: str, folder: Path, files: Mapping[str, Path]) -> None:
        """Nothing to keep them in."""
