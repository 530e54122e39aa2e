"""A checked configuration of one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from cfsp.config.budget import Budget
from cfsp.config.components import Component
from cfsp.config.contracts import Allocator, Evaluator, NeuronImportance, Pruner, Recovery, RunLogger
from cfsp.config.deciding import Decides
from cfsp.config.sections import (
    CalibrationSection,
    ModelSection,
    PathsSection,
    PluginsSection,
    SaveSection,
    SparsitySection,
)


@dataclass(frozen=True)
class RunConfig:
    """A checked configuration. Components are instances; ``raw`` is the resolved configuration as given.

    The fields of the configuration's keys carry what the groups decide (:mod:`cfsp.config.deciding`).
    """

    model: ModelSection
    calibration: CalibrationSection
    sparsity: SparsitySection
    importance: Component[NeuronImportance]
    allocator: Component[Allocator]
    pruner: Component[Pruner]
    recovery: Component[Recovery]
    evaluation: Mapping[str, Component[Evaluator]]
    evaluation_name: str
    logger: Annotated[Component[RunLogger], Decides("nothing")]
    paths: Annotated[PathsSection, Decides("nothing")]
    save: SaveSection
    plugins: Annotated[PluginsSection, Decides("nothing")]
    seed: int
    force: Annotated[bool, Decides("nothing")]
    debug: Annotated[bool, Decides("nothing")]
    evaluate_selection: Annotated[bool, Decides(before=False)]
    raw: dict[str, Any]
    #: force=check: the hashes of a finished run's files are compared, not their sizes alone.
    check_files: bool = False

    @property
    def budget(self) -> Budget:
        return Budget(**self.sparsity.model_dump())

    @property
    def plans_with(self) -> tuple[str, ...]:
        """The groups that the pruner draws on."""
        return self.pruner.instance.plans_with
