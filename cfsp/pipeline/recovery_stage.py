"""The recovery stage: the context of a recovery, in the first process and in those that train with it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cfsp.allocator.coarse import Coarse
from cfsp.errors import RunError
from cfsp.importance.base import Scores, distances_of
from cfsp.model.finite import round_to_stored
from cfsp.model.load import load_model
from cfsp.model.snapshot import Snapshot
from cfsp.pipeline.preflight import Prepared, prepare
from cfsp.pruner.apply import apply
from cfsp.recovery.base import Recovered, RecoveryContext
from cfsp.system import processes

if TYPE_CHECKING:
    from cfsp.config.run_config import RunConfig
    from cfsp.plan.pruning_plan import PruningPlan
    from cfsp.pruner.base import PlanContext

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Training:
    """The facts that the first process sends to the others, so that all train the same model."""

    run_id: str
    plan: PruningPlan
    importance: Tensor
    out: Path


@dataclass(frozen=True)
class _Ended:
    """The job is over; ``code`` is its exit code."""

    code: int


def recover(
    prepared: Prepared,
    as_it_was: Snapshot,
    planned: PlanContext,
    plan: PruningPlan,
    out: Path,
    *,
    base: Callable[[], Path | None],
    report: Callable[[dict[str, Any]], None],
) -> Recovered:
    """Train the pruned model with all processes of this run.

    Args:
        as_it_was: snapshot of the dense model before it was pruned.
    """
    job = _Training(prepared.run_id, plan, coarse_importance(planned), out)
    processes.shared(lambda: job)
    return _train(prepared, as_it_was, job, base, report)


def coarse_importance(planned: PlanContext) -> Tensor:
    """Return s_l [L] of the base model: the allocator's own where it states one, else that of Coarse()."""
    scores = Scores((), (), distances_of(planned.statistics))
    importance = planned.allocator.block_importance(scores)
    return Coarse().block_importance(scores) if importance is None else importance


def assist(config: RunConfig) -> int:
    """Run as any process but the first: wait, train when the first process says so, and end with its exit code."""
    while True:
        job: Any = processes.shared(lambda: None)
        if isinstance(job, _Ended):
            return job.code
        prepared = prepare(config)
        if prepared.run_id != job.run_id:
            raise RunError(
                f"process {processes.launched().rank} has other inputs (run {prepared.run_id}, the first process has "
                f"{job.run_id}); give every machine the same model and data"
            )
        trust = config.model.trust_remote_code
        model: Any = load_model(prepared.source, dtype=prepared.dtype, device=prepared.device, trust_remote_code=trust)
        as_it_was = Snapshot(model)
        apply(model, job.plan)
        round_to_stored(model, prepared.stored_dtype)
        _train(prepared, as_it_was, job, lambda: None, lambda _: None)


def release(code: int) -> None:
    """Tell the other processes that this job is over."""
    processes.shared(lambda: _Ended(code))


def _train(
    prepared: Prepared,
    as_it_was: Snapshot,
    job: _Training,
    base: Callable[[], Path | None],
    report: Callable[[dict[str, Any]], None],
) -> Recovered:
    config = prepared.config
    context = RecoveryContext(
        model=as_it_was.model,
        dense=as_it_was.active,
        parked=as_it_was.parked,
        tokenizer=prepared.tokenizer,
        limits=prepared.limits,
        plan=job.plan,
        importance=job.importance,
        folder=prepared.progress / "training",
        adapter=job.out / "adapter",
        base=base,
        cache=Path(config.paths.cache_dir),
        fingerprint=prepared.source.fingerprint,
        run_id=job.run_id,
        seed=config.seed,
        report=report,
    )
    with warnings.catch_warnings(), processes.together():
        # peft still uses a name that transformers has renamed
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        return config.recovery.instance.recover(context)
