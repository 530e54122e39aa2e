"""Recovery stage: it builds the recovery context in the first process and in the processes that train with it."""

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
    """Inputs that the first process sends to the others, so that all processes train the same model.

    Attributes:
        run_id: id of the first process's run.
        plan: plan by which every process prunes its model.
        importance: block importance [L] of the base model.
        out: OUT of the first process.
    """

    run_id: str
    plan: PruningPlan
    importance: Tensor
    out: Path


@dataclass(frozen=True)
class _RunOver:
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
        run: the current run.
        dense: snapshot of the dense model before it was pruned.
        planned: the context in which the plan was made.
        plan: the plan by which the model was pruned.
        base: function that saves the pruned model to which an adapter belongs, and returns its folder; None if the run
            saves no model.
    """
    job = _Training(run.prepared.run_id, plan, coarse_importance(planned), run.out)
    processes.from_first(lambda: job)
    return _train(run.prepared, dense, job, base, run.report)


def coarse_importance(planned: PlanContext) -> Tensor:
    """Return the block importance s_l [L] of the base model.

    ``Coarse()`` computes it if the allocator states none.
    """
    scores = Scores((), (), block_distances_by_name(planned.statistics))
    importance = planned.allocator.block_importance(scores)
    return Coarse().block_importance(scores) if importance is None else importance


def join_training(config: RunConfig) -> int:
    """Train with the first process until it ends the run; every process but the first calls this function.

    Returns:
        The exit code of the first process.

    Raises:
        RunError: the inputs of this process differ from those of the first process.
    """
    while True:
        job: Any = processes.from_first(lambda: None)
        if isinstance(job, _RunOver):
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


def end_other_processes(code: int) -> None:
    """Send the exit code of the run to the other processes, which then end."""
    processes.from_first(lambda: _RunOver(code))


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
        # peft uses a name that transformers has deprecated
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        return config.recovery.instance.recover(context)
