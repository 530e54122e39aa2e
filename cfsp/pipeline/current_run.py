"""State of the current run: its checked inputs, its record, its folder and its stages, in one object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.pipeline.preflight import Prepared
from cfsp.record.out_folder import OutFolder
from cfsp.record.run_record import RunRecord
from cfsp.record.stages import Stages

if TYPE_CHECKING:
    from cfsp.config.run_config import RunConfig


@dataclass
class Run:
    """State of the current run, which every stage receives.

    Attributes:
        prepared: the checked inputs.
        record: content of record.json; each stage adds its part.
        folder: OUT, as it was when the run began.
        stages: records the duration of each stage, and checks after each that OUT still exists.
    """

    prepared: Prepared
    record: RunRecord
    folder: OutFolder
    stages: Stages = field(init=False)

    def __post_init__(self) -> None:
        self.stages = Stages(after=self.folder.check)
        self.record.stages = self.stages.entries

    @property
    def config(self) -> RunConfig:
        """The checked configuration."""
        return self.prepared.config

    @property
    def out(self) -> Path:
        """Path of OUT."""
        return self.folder.path

    @property
    def report(self) -> Callable[[dict[str, Any]], None]:
        """Function that sends the figures of a training step to the logger."""
        report: Callable[[dict[str, Any]], None] = self.config.logger.instance.log
        return report
