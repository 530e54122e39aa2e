"""Stages of one run, in their order."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from cfsp.architecture.views import DecoderView
from cfsp.calibration.batching import batch_size
from cfsp.calibration.calibration_set import CalibrationSet, load_windows
from cfsp.calibration.self_generated import load_or_sample_windows
from cfsp.calibration.statistics_cache import StatisticsCache
from cfsp.config.run_config import RunConfig
from cfsp.config.sections import SelfCalibration
from cfsp.evaluation.base import Side
from cfsp.export import card
from cfsp.model.driver import BlockDriver
from cfsp.model.finite import round_to_stored
from cfsp.model.snapshot import Snapshot
from cfsp.model.trial import translate_model_code_errors
from cfsp.pipeline.current_run import Run
from cfsp.pipeline.measure import add_measurements, current_side, evaluate_dense, evaluate_side, evaluate_side_by_side
from cfsp.pipeline.preflight import Prepared
from cfsp.pipeline.recovery_stage import recover
from cfsp.pipeline.save import export_model, facts_of_run, save_base, save_model, state_of_plan
from cfsp.plan.pruning_plan import PruningPlan
from cfsp.pruner.apply import apply, check_fits, sliced
from cfsp.pruner.base import PlanContext
from cfsp.pruner.context import plan_context
from cfsp.record.figure import draw_blocks, draw_recovery
from cfsp.record.out_folder import OutputGoneError
from cfsp.record.run_record import RunRecord
from cfsp.system.atomic import replacing
from cfsp.system.cache import read_or_compute, saved_seconds

log = logging.getLogger(__name__)


def run_stages(run: Run, model: Any, view: DecoderView) -> None:
    """Run the stages after loading, in order; each adds its part to the record.

    Args:
        run: the current run.
        model: the dense model. It is pruned in place.
        view: the view of ``model``.

    Raises:
        CfspError: a stage failed. If it was an evaluation, the pruned model has been saved first.
    """
    config = run.config
    if not config.pruner.instance.prunes:
        _evaluate_unpruned(run, model)
        return
    context = _calibrate(run, view)
    plan = _plan(run, view, context)
    failures: list[Exception] = []
    _evaluate_before_pruning(run, model, view, plan, failures)
    compares = any(evaluator.instance.side_by_side for evaluator in config.evaluation.values())
    # A snapshot keeps the dense weights alive, so it is taken only for a teacher or for the dense side of a comparison.
    trains = config.recovery.instance.trains
    dense = Snapshot(model) if not failures and (compares or trains) else None
    with run.stages("apply"):
        apply(model, plan)
    round_to_stored(model, run.prepared.stored_dtype)
    if trains and run.prepared.evaluation and not failures:
        with _postpone_errors(failures, config), run.stages("evaluate pruned"):
            run.record.measurements["pruned"] = evaluate_side(run.prepared, model, "pruned")
    if failures:
        with run.stages("save"):
            _save_despite_failure(run, model, plan, run.out / ("pruned" if trains else "model"))
        raise failures[0]
    sides = ["pruned"]
    if trains:
        assert dense is not None
        model = _recover(run, model, dense, context, plan)
        sides.append("recovered")
    if config.save.model:
        _save(run, model, plan)
    if run.prepared.evaluation:
        _evaluate_result(run, model, dense, sides)
    if config.save.model and run.record.checkpoint:
        _complete_folder(run, plan)
    _draw(run, plan)


def _evaluate_unpruned(run: Run, model: nn.Module) -> None:
    measurements = run.record.measurements
    with run.stages("evaluate") as stage:
        measurements["dense"], stage["cached"] = evaluate_dense(run.prepared, model)
        sides = [current_side("dense", run.prepared)]
        add_measurements(measurements, evaluate_side_by_side(run.prepared, model, sides))


def _calibrate(run: Run, view: DecoderView) -> PlanContext:
    with run.stages("calibrate") as stage, saved_seconds(stage), model_code_errors(run.prepared):
        context, stage["cached"] = _plan_context(run.prepared, view)
        run.record.calibration = {**context.calibration.describe(), "batch_size": context.driver.batch_size}
    return context


def _plan(run: Run, view: DecoderView, context: PlanContext) -> PruningPlan:
    with run.stages("plan") as stage, saved_seconds(stage), model_code_errors(run.prepared):
        plan, stage["cached"] = read_or_compute(
            run.prepared.progress / "plan.json",
            lambda file: _check_resumed_plan(PruningPlan.load(file), run.prepared, view),
            lambda: run.config.pruner.instance.plan(context),
            PruningPlan.save,
        )
        plan.save(run.out / "plan.json")
        _record_plan(run.record, plan)
    return plan


def _evaluate_before_pruning(
    run: Run, model: nn.Module, view: DecoderView, plan: PruningPlan, failures: list[Exception]
) -> None:
    """Evaluate the dense model and, with ``evaluate_selection``, the pruned model before compensation."""
    if not run.prepared.evaluation:
        return
    measurements = run.record.measurements
    with _postpone_errors(failures, run.config):
        with run.stages("evaluate dense") as stage:
            measurements["dense"], stage["cached"] = evaluate_dense(run.prepared, model)
        if run.config.evaluate_selection and plan.tensors:
            with run.stages("evaluate selected"), sliced(view, plan.blocks):
                measurements["selected"] = evaluate_side(run.prepared, model, "selected")


def _recover(run: Run, model: Any, dense: Snapshot, context: PlanContext, plan: PruningPlan) -> Any:
    """Train the pruned model and return the trained model."""
    with run.stages("recover"):
        base = partial(save_base, run, model, plan, facts_of_run(run, plan))
        recovered = recover(run, dense, context, plan, base=base)
        run.record.recovery = recovered.record
        round_to_stored(recovered.model, run.prepared.stored_dtype)
    return recovered.model


def _save(run: Run, model: Any, plan: PruningPlan) -> None:
    with run.stages("save"):
        state = "recovered" if run.config.recovery.instance.trains else state_of_plan(plan)
        saved = save_model(run.prepared, model, plan, run.out / "model", state, facts_of_run(run, plan))
        run.record.checkpoint = {"form": saved.form, "bytes": saved.bytes, "dtype": saved.dtype, "state": state}


def _evaluate_result(run: Run, model: nn.Module, dense: Snapshot | None, sides: list[str]) -> None:
    """Evaluate the final model, then measure the cost of all sides in alternation."""
    measurements, prepared = run.record.measurements, run.prepared
    with run.stages(f"evaluate {sides[-1]}"):
        measurements[sides[-1]] = evaluate_side(prepared, model, sides[-1])
    with run.stages("measure cost"):
        # A recovery changes weights that the sides share, but the cost does not depend on their values.
        compared = [Side("dense", dense.active, prepared.stored_dtype)] if dense is not None else []
        compared += [current_side(side, prepared) for side in sides]
        add_measurements(measurements, evaluate_side_by_side(prepared, model, compared))


def _complete_folder(run: Run, plan: PruningPlan) -> None:
    """Write the model card with the figures, then the export.

    The export comes last, because its card shows the figures and its failure must not lose them.
    """
    assert run.record.checkpoint is not None
    card.write_card(run.out / "model", facts_of_run(run, plan), run.record.checkpoint["form"])
    if run.config.save.format != "hf":
        with run.stages("export"):
            run.record.checkpoint["export"] = export_model(run.config.save.format, run.out)


def _draw(run: Run, plan: PruningPlan) -> None:
    with replacing(run.out / "blocks.png") as file:
        draw_blocks(plan, run.config.allocator.instance.block_distance() or "angular", file)
    if run.record.recovery and run.record.recovery.get("history"):
        with replacing(run.out / "recovery.png") as file:
            draw_recovery(run.record.recovery, file)


@contextlib.contextmanager
def _postpone_errors(failures: list[Exception], config: RunConfig) -> Iterator[None]:
    """Add an error of an evaluation to ``failures``, so that the pruned model is saved before the run fails."""
    try:
        yield
    except OutputGoneError:
        raise
    except Exception as error:
        if not config.save.model:
            raise
        log.warning("the evaluation failed (%s); the pruned model is saved first", type(error).__name__)
        failures.append(error)


def _save_despite_failure(run: Run, model: Any, plan: PruningPlan, folder: Path) -> None:
    """Save the pruned model of a run whose evaluation failed, and record its folder."""
    state = state_of_plan(plan)
    try:
        saved = save_model(run.prepared, model, plan, folder, state, facts_of_run(run, plan))
    except Exception as error:
        log.warning("the pruned model cannot be saved either (%s: %s)", type(error).__name__, error)
        return
    run.record.checkpoint = {
        "form": saved.form, "bytes": saved.bytes, "dtype": saved.dtype, "state": state, "place": folder.name,
    }  # fmt: skip


def _check_resumed_plan(plan: PruningPlan, prepared: Prepared, view: DecoderView) -> PruningPlan:
    """Check the plan that a killed run of the same id stored, and return it.

    Raises:
        ValueError, CfspError: the plan does not belong to this model, or is incomplete.
    """
    if plan.base_fingerprint != prepared.source.fingerprint:
        raise ValueError("it is the plan of another model")
    if len(plan.details) != len(plan.blocks) or not all({"width", "kv_groups"} <= row.keys() for row in plan.details):
        raise ValueError("its details are missing")
    check_fits(view, plan)
    return plan


def model_code_errors(prepared: Prepared) -> contextlib.AbstractContextManager[None]:
    """Return a context that turns errors of the model's own code into errors about that model."""
    return translate_model_code_errors(str(prepared.source.config.get("model_type")), prepared.source.origin)


def _plan_context(prepared: Prepared, view: DecoderView) -> tuple[PlanContext, bool]:
    config = prepared.config
    calibration = prepared.calibration or _sample_calibration(prepared, view.model)
    driver = BlockDriver(view, batch_size(config.calibration.batch_size, view, calibration.input_ids.shape[1]))
    cache = StatisticsCache(Path(config.paths.cache_dir), prepared.source.fingerprint)
    return plan_context(
        config,
        driver,
        calibration,
        base_model=prepared.source.origin,
        base_fingerprint=prepared.source.fingerprint,
        cache=cache,
    )


def _sample_calibration(prepared: Prepared, model: nn.Module) -> CalibrationSet:
    """Load a calibration set of which windows are sampled from the dense model."""
    config, tokenizer, limits = prepared.config, prepared.tokenizer, prepared.limits
    cache, fingerprint = Path(config.paths.cache_dir), prepared.source.fingerprint

    def sample(section: SelfCalibration) -> CalibrationSet:
        return load_or_sample_windows(model, tokenizer, section, limits, config.seed, cache, fingerprint)

    calibration = load_windows(config.calibration, tokenizer, limits, config.seed, sample)
    assert calibration is not None
    return calibration


def _record_plan(record: RunRecord, plan: PruningPlan) -> None:
    record.plan = {
        "base_model": plan.base_model,
        "base_fingerprint": plan.base_fingerprint,
        "requested": plan.requested,
        "achieved": plan.achieved,
        "parameters": plan.parameters,
        "notes": plan.notes,
    }
    record.blocks = list(plan.details)
    log.info("kept FFN widths: %s", " ".join(str(row["width"]) for row in plan.details))
    log.info("kept KV groups: %s", " ".join(str(row["kv_groups"]) for row in plan.details))
