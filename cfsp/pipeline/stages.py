"""The stages of one run in their order."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from cfsp.architecture.views import DecoderView
from cfsp.calibration.batching import batch_size
from cfsp.calibration.calibration_set import CalibrationSet
from cfsp.calibration.self_generated import sampled
from cfsp.calibration.statistics_cache import StatisticsCache
from cfsp.config.run_config import RunConfig
from cfsp.config.sections import SelfCalibration
from cfsp.evaluation.base import Side
from cfsp.export import card
from cfsp.model.driver import BlockDriver
from cfsp.model.finite import round_to_stored
from cfsp.model.snapshot import Snapshot
from cfsp.model.trial import model_code_refused
from cfsp.pipeline.measure import add, evaluate_dense, measured_side, side_by_side, side_of
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
from cfsp.record.stages import Stages
from cfsp.system.atomic import replacing
from cfsp.system.cache import read_or_compute, saved_seconds

log = logging.getLogger(__name__)


def run_stages(
    prepared: Prepared,
    record: RunRecord,
    out: Path,
    report: Callable[[dict[str, Any]], None],
    model: Any,
    view: DecoderView,
    stages: Stages,
) -> None:
    config = prepared.config
    if not config.pruner.instance.prunes:
        with stages("evaluate") as stage:
            record.measurements["dense"], stage["cached"] = evaluate_dense(prepared, model)
            add(record.measurements, side_by_side(prepared, model, [side_of("dense", prepared)]))
        return
    with stages("calibrate") as stage, saved_seconds(stage), model_code(prepared):
        context, stage["cached"] = _context(prepared, view)
        record.calibration = {**context.calibration.describe(), "batch_size": context.driver.batch_size}
    with stages("plan") as stage, saved_seconds(stage), model_code(prepared):
        plan, stage["cached"] = read_or_compute(
            prepared.progress / "plan.json",
            lambda file: _resumable(PruningPlan.load(file), prepared, view),
            lambda: config.pruner.instance.plan(context),
            PruningPlan.save,
        )
        plan.save(out / "plan.json")
        _record_plan(record, plan)
    failed: list[Exception] = []
    if prepared.evaluation:
        with _postponed(failed, config):
            with stages("evaluate dense") as stage:
                record.measurements["dense"], stage["cached"] = evaluate_dense(prepared, model)
            if config.evaluate_selection and plan.tensors:
                with stages("evaluate selected"), sliced(view, plan.blocks):
                    record.measurements["selected"] = measured_side(prepared, model, "selected")
    compared = any(evaluator.instance.side_by_side for evaluator in config.evaluation.values())
    # It keeps the dense weights, so only where somebody needs them: a teacher, the dense side of a comparison.
    trains = config.recovery.instance.trains
    as_it_was = Snapshot(model) if not failed and (compared or trains) else None
    with stages("apply"):
        apply(model, plan)
    round_to_stored(model, prepared.stored_dtype)
    if trains and prepared.evaluation and not failed:
        with _postponed(failed, config), stages("evaluate pruned"):
            record.measurements["pruned"] = measured_side(prepared, model, "pruned")
    if failed:
        with stages("save"):
            _keep(prepared, model, plan, out / ("pruned" if trains else "model"), record)
        raise failed[0]
    sides = ["pruned"]
    if trains:
        with stages("recover"):
            assert as_it_was is not None
            base = partial(save_base, prepared, model, plan, out, facts_of_run(prepared, plan, record))
            recovered = recover(prepared, as_it_was, context, plan, out, base=base, report=report)
            model, record.recovery = recovered.model, recovered.record
            round_to_stored(model, prepared.stored_dtype)
        sides.append("recovered")
    if config.save.model:
        with stages("save"):
            state = "recovered" if "recovered" in sides else state_of_plan(plan)
            facts = facts_of_run(prepared, plan, record)
            saved = save_model(prepared, model, plan, out / "model", state, facts)
            record.checkpoint = {"form": saved.form, "bytes": saved.bytes, "dtype": saved.dtype, "state": state}
    if prepared.evaluation:
        with stages(f"evaluate {sides[-1]}"):
            record.measurements[sides[-1]] = measured_side(prepared, model, sides[-1])
        with stages("measure cost"):
            # A recovery trains weights that the three share; what they cost does not depend on the values.
            dense = [Side("dense", as_it_was.active, prepared.stored_dtype)] if as_it_was is not None else []
            add(record.measurements, side_by_side(prepared, model, [*dense, *(side_of(s, prepared) for s in sides)]))
    if config.save.model and record.checkpoint:
        card.write_card(out / "model", facts_of_run(prepared, plan, record), record.checkpoint["form"])
        if config.save.format != "hf":  # after the figures, which its card shows and its failure must not cost
            with stages("export"):
                record.checkpoint["export"] = export_model(config.save.format, out)
    with replacing(out / "blocks.png") as file:
        draw_blocks(plan, _distance_shown(config), file)
    if record.recovery and record.recovery.get("history"):
        with replacing(out / "recovery.png") as file:
            draw_recovery(record.recovery, file)


@contextlib.contextmanager
def _postponed(failed: list[Exception], config: RunConfig) -> Iterator[None]:
    """Put the error of an evaluation into ``failed``, so that the pruned model is saved before the run ends with it."""
    try:
        yield
    except OutputGoneError:
        raise
    except Exception as error:
        if not config.save.model:
            raise
        log.warning("the evaluation failed (%s); the pruned model is saved first", type(error).__name__)
        failed.append(error)


def _keep(prepared: Prepared, model: Any, plan: PruningPlan, folder: Path, record: RunRecord) -> None:
    """Save the pruned model of a run whose evaluation has failed; the record says where it is."""
    state = state_of_plan(plan)
    try:
        saved = save_model(prepared, model, plan, folder, state, facts_of_run(prepared, plan, record))
    except Exception as error:
        log.warning("the pruned model cannot be saved either (%s: %s)", type(error).__name__, error)
        return
    record.checkpoint = {
        "form": saved.form, "bytes": saved.bytes, "dtype": saved.dtype, "state": state, "place": folder.name,
    }  # fmt: skip


def _resumable(plan: PruningPlan, prepared: Prepared, view: DecoderView) -> PruningPlan:
    """Return a plan that a killed run of this id has left.

    Raises:
        ValueError, CfspError: it is not a plan for this model.
    """
    if plan.base_fingerprint != prepared.source.fingerprint:
        raise ValueError("it is the plan of another model")
    if len(plan.details) != len(plan.blocks) or not all({"width", "kv_groups"} <= row.keys() for row in plan.details):
        raise ValueError("its details are missing")
    check_fits(view, plan)
    return plan


def model_code(prepared: Prepared) -> contextlib.AbstractContextManager[None]:
    return model_code_refused(str(prepared.source.config.get("model_type")), prepared.source.origin)


def _context(prepared: Prepared, view: DecoderView) -> tuple[PlanContext, bool]:
    config = prepared.config
    calibration = prepared.calibration or _sampled(prepared, view.model)
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


def _sampled(prepared: Prepared, model: nn.Module) -> CalibrationSet:
    section, config = prepared.config.calibration, prepared.config
    assert isinstance(section, SelfCalibration)
    cache, fingerprint = Path(config.paths.cache_dir), prepared.source.fingerprint
    return sampled(model, prepared.tokenizer, section, prepared.limits, config.seed, cache, fingerprint)


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


def _distance_shown(config: RunConfig) -> str:
    return config.allocator.instance.block_distance() or "angular"
