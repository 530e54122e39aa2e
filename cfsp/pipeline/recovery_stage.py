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
from cfsp.importance.base import Scores, block_distances_by_name
from cfsp.model.finite import round_to_stored
from cfsp.model.load import load_model
from cfsp.model.snapshot import Snapshot
from cfsp.pipeline.preflight import Prepared, prepare
from cfsp.pruner.apply import apply
from cfsp.recovery.base import Recovered, RecoveryContext
from cfsp.system import processes

if TYPE_CHECKING:
    from cfsp.config.run_config import RunConfig
    from cfsp.pipeline.current_run import Run
    from cfsp.plan.pruning_plan import PruningPlan
    from cfsp.pruner.base import PlanContext

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Training:
    """The facts that the first process sends to the others, so that all train the same model.

    Attributes:
        run_id: id of the first process's run.
        plan: the plan that every process cuts its model by.
        importance: block importance [L] of the base model.
        out: OUT of the first process.
    """

    run_id: str
    plan: PruningPlan
    importance: Tensor
    out: Path


@dataclass(frozen=True)
class _Ended:
    """Message to the other processes that the run is over.

    Attributes:
        code: exit code of the run.
    """

    code: int


def recover(
    run: Run, dense: Snapshot, planned: PlanContext, plan: PruningPlan, *, base: Callable[[], Path | None]
) -> Recovered:
    """Train the pruned model with all processes of this run.

    Args:
        run: the run under way.
        dense: snapshot of the dense model before it was pruned.
        planned: the context that the plan was made in.
        plan: the plan that the model was cut by.
        base: saves the pruned model that an adapter stands on; returns its folder, or None where none is saved.
    """
    job = _Training(run.prepared.run_id, plan, coarse_importance(planned), run.out)
    processes.shared(lambda: job)
    return _train(run.prepared, dense, job, base, run.report)


def coarse_importance(planned: PlanContext) -> Tensor:
    """Return the block importance s_l [L] of the base model.

    An allocator that states none gets that of ``Coarse()``.
    """
    scores = Scores((), (), block_distances_by_name(planned.statistics))
    importance = planned.allocator.block_importance(scores)
    return Coarse().block_importance(scores) if importance is None else importance


def assist(config: RunConfig) -> int:
    """Run as any process but the first.

    Returns:
        The exit code of the first process.

    Raises:
        RunError: this process has other inputs than the first.
    """
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
        dense = Snapshot(model)
        apply(model, job.plan)
        round_to_stored(model, prepared.stored_dtype)
        _train(prepared, dense, job, lambda: None, lambda _: None)


def release(code: int) -> None:
    """Tell the other processes that the run is over, with its exit code."""
    processes.shared(lambda: _Ended(code))


def _train(
    prepared: Prepared,
    dense: Snapshot,
    job: _Training,
    base: Callable[[], Path | None],
    report: Callable[[dict[str, Any]], None],
) -> Recovered:
    config = prepared.config
    context = RecoveryContext(
        model=dense.model,
        dense=dense.active,
        parked=dense.parked,
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
