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
        model: pruned model.
        dense: returns a context in which ``model`` is the dense model again.
        parked: returns a context in which the tensors that only the dense model needs are kept in CPU memory.
        tokenizer: tokenizer of the model.
        limits: vocabulary size and number of positions of the model.
        plan: pruning plan of the model.
        importance: coarse importance s_l of the base model's blocks, [L].
        folder: folder for training checkpoints.
        adapter: folder for an adapter.
        base: saves the pruned model to which an adapter belongs, and returns its folder; returns None if the run saves
            no model.
        cache: folder for results that take long to compute.
        fingerprint: hash of the dense model's content.
        run_id: identifier of the run.
        seed: random seed of the run.
        report: logs values by name while the model trains.
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

    The training curve is drawn if the record has ``history``, ``objective``, ``tokens`` and ``trainable_parameters``.

    Attributes:
        model: recovered model, with adapters merged.
        record: facts for the run's record; contains at least ``name``.
    """

    model: nn.Module
    record: dict[str, Any] = field(default_factory=dict)
