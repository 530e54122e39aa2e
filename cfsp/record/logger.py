"""The logger interface: a mirror of the record. The null logger stands where none is wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from cfsp.components import component


class RunLogger(Protocol):
    """Started once per run, finished once, whatever happens in between."""

    def start(self, run_id: str, folder: Path, configuration: dict[str, Any]) -> None: ...
    def log(self, values: dict[str, Any]) -> None: ...
    def image(self, name: str, path: Path) -> None: ...
    def finish(self, *, success: bool) -> None: ...


@component
class NullLogger:
    """Logs nowhere."""

    def start(self, run_id: str, folder: Path, configuration: dict[str, Any]) -> None:
        """Nothing to start."""

    def log(self, values: dict[str, Any]) -> None:
        """Nothing to log to."""

    def image(self, name: str, path: Path) -> None:
        """Nothing to show it on."""

    def finish(self, *, success: bool) -> None:
        """Nothing to finish."""
