"""The run that is under way: its checked inputs, its record, its folder and its stages, in one object."""

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
    """One run under way, handed from stage to stage.

    Attributes:
        prepared: the checked inputs.
        record: what becomes record.json; each stage writes its part of it.
        folder: OUT, as it was when the run began.
        stages: times each stage into the record, and sees after each that OUT is still there.
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
        """Send a step of the training to the logger."""
        report: Callable[[dict[str, Any]], None] = self.config.logger.instance.log
        return report
