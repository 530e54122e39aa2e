"""A checked configuration of one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cfsp.config.budget import Budget
from cfsp.config.components import Component
from cfsp.config.contracts import Allocator, Evaluator, NeuronImportance, Pruner, Recovery, RunLogger
from cfsp.config.sections import CalibrationSection, ModelSection, PathsSection, SaveSection, SparsitySection


@dataclass(frozen=True)
class RunConfig:
    """A checked configuration. Components are instances; ``raw`` is the resolved configuration as given."""

    model: ModelSection
    calibration: CalibrationSection
    sparsity: SparsitySection
    importance: Component[NeuronImportance]
    allocator: Component[Allocator]
    pruner: Component[Pruner]
    recovery: Component[Recovery]
    evaluation: Mapping[str, Component[Evaluator]]
    evaluation_name: str
    logger: Component[RunLogger]
    paths: PathsSection
    save: SaveSection
    seed: int
    force: bool
    debug: bool
    evaluate_selection: bool
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
