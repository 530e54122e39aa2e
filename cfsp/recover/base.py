"""What a recovery is: it turns the pruned model into one of the same structure with better weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.contracts import Recovery

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cfsp.data.calibration import Limits
    from cfsp.pruning.plan import PruningPlan


__all__ = ["Recovered", "Recovery", "RecoveryContext"]


@dataclass(frozen=True)
class RecoveryContext:
    """Everything a recovery may use.

    ``model``: the pruned model. ``dense``: entered, the same module is the dense model again. ``parked``: entered, what
    only the dense model has waits in the CPU's memory. ``importance``: coarse s_l of the base model's blocks [L].
    ``folder``: training checkpoints. ``adapter``: where an adapter is written. ``base``: saves the pruned model that an
    adapter stands on and says where; None where nothing is to be saved. ``report``: called with what happens while it
    trains. ``seed`` and ``run_id`` are the run's.
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
    """The model (adapters merged) and what the record says about how it came to be: at least its ``name``.

    With ``history`` (rows of step and loss), ``objective``, ``tokens`` and ``trainable_parameters`` it is drawn.
    """

    model: nn.Module
    record: dict[str, Any] = field(default_factory=dict)
