"""What a recovery is: it turns the pruned model into one of the same structure with better weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from cfsp.data.calibration import Limits
    from cfsp.models.views import DecoderView
    from cfsp.pruning.plan import PruningPlan


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


class Recovery(Protocol):
    """``trains``: False where the weights stay as they are."""

    name: str
    trains: ClassVar[bool]

    def check(self, view: DecoderView, tokenizer: Any, limits: Limits, device: torch.device) -> dict[str, Any]:
        """Find and check the data and the hardware; returns what decides the result, by content.

        Raises:
            CfspError: data is missing or does not fit, a module to adapt is not there, the hardware lacks something.
        """
        ...

    def recover(self, context: RecoveryContext) -> Recovered:
        """Train; the model is changed in place."""
        ...
