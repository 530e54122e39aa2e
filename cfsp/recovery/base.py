"""The context that a recovery works in, and its result."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.config.contracts import Recovery

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cfsp.data.limits import Limits
    from cfsp.plan.pruning_plan import PruningPlan


__all__ = ["Recovered", "Recovery", "RecoveryContext"]


@dataclass(frozen=True)
class RecoveryContext:
    """Everything that a recovery may use.

    Attributes:
        model: the pruned model.
        dense: while entered, the same module is the dense model again.
        parked: while entered, the tensors that only the dense model has wait in the CPU's memory.
        tokenizer: tokenizer of the model.
        limits: vocabulary and positions of the model.
        plan: the plan that the model was pruned by.
        importance: coarse importance s_l of the base model's blocks [L].
        folder: folder for training checkpoints.
        adapter: folder for an adapter.
        base: saves the pruned model that an adapter stands on and returns its folder; None where nothing is saved.
        cache: folder for results that take long to compute.
        fingerprint: content of the dense model.
        run_id: the run's.
        seed: the run's.
        report: called with values to log while the model trains.
    """

    model: nn.Module
    dense: Callable[[], AbstractContextManager[None]]
    parked: Callable[[], AbstractContextManager[None]]
    tokenizer: Any
    limits: Limits
    plan: PruningPlan
    importance: Tensor
    folder: Path
    adapter: Path
    base: Callable[[], Path | None]
    cache: Path
    fingerprint: str
    run_id: str
    seed: int
    report: Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Recovered:
    """The result of a recovery.

    Where ``history``, ``objective``, ``tokens`` and ``trainable_parameters`` are in the record, it is drawn.

    Attributes:
        model: the recovered model, adapters merged.
        record: facts for the run's record, at least the ``name``.
    """

    model: nn.Module
    record: dict[str, Any] = field(default_factory=dict)
