"""The checked configuration of one run."""

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
    """Checked configuration of one run.

    Attributes:
        model: the model and how it is loaded.
        calibration: the calibration set.
        sparsity: the budget.
        importance: metric that scores neurons.
        allocator: allocation of the budget to blocks.
        pruner: the pruner.
        recovery: training after pruning.
        evaluation: name -> evaluator.
        evaluation_name: name of the evaluation preset.
        logger: mirror of the record.
        paths: folders that the run writes.
        save: whether and in which form the pruned model is saved.
        seed: seed of everything random.
        force: whether a finished run is repeated.
        debug: whether tracebacks of errors are shown.
        evaluate_selection: whether the pruned model before compensation is evaluated too.
        raw: the resolved configuration as given.
        check_files: force=check: whether the hashes of a finished run's files are compared, not only their sizes.
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
    logger: Component[RunLogger]
    paths: PathsSection
    save: SaveSection
    seed: int
    force: bool
    debug: bool
    evaluate_selection: bool
    raw: dict[str, Any]
    check_files: bool = False

    @property
    def budget(self) -> Budget:
        """The sparsity budget."""
        return Budget(**self.sparsity.model_dump())

    @property
    def plans_with(self) -> tuple[str, ...]:
        """Groups that the pruner uses, of importance and allocator."""
        return self.pruner.instance.plans_with
