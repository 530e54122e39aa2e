"""The order of the stages, what is skipped because it is done, and what happens when one fails. No science."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cfsp.calibrate.batching import batch_size
from cfsp.calibrate.cache import StatisticsCache, read_or_compute, saved_seconds
from cfsp.config import RunConfig, SelfCalibration
from cfsp.data.calibration import CalibrationSet
from cfsp.data.self_generated import sampled
from cfsp.errors import BusyError, CheckpointError, ConfigError, RunError
from cfsp.evaluate.base import Side, parts_of
from cfsp.evaluate.measurement import Measurement
from cfsp.export import card
from cfsp.export.command import Request, check_place, exported, place_beside
from cfsp.identity import METHOD_VERSION, digest, method_of
from cfsp.importance.base import required
from cfsp.lease import holder, take
from cfsp.models.base_models import BaseModels
from cfsp.models.checkpoint import SavedCheckpoint, check_destination, round_to_stored, save_checkpoint
from cfsp.models.driver import BlockDriver
from cfsp.models.remote_code import PRUNED_PREFIX
from cfsp.models.snapshot import Snapshot
from cfsp.models.views import DecoderView, resolve
from cfsp.prepare import Prepared, prepare
from cfsp.pruning.apply import apply, sliced
from cfsp.pruning.base import PlanContext, removes_experts, removes_heads
from cfsp.pruning.context import plan_context
from cfsp.pruning.plan import COMPENSATION_IN_FOLDER, PruningPlan
from cfsp.record import environment
from cfsp.record.figure import draw_blocks, draw_recovery
from cfsp.record.run_record import RunRecord
from cfsp.record.stages import Stages
from cfsp.recover.stage import recover

log = logging.getLogger(__name__)

#: In OUT: who is at the run.
LEASE = ".lease"


def run(config: RunConfig, *, multirun: bool = False, bases: BaseModels | None = None) -> tuple[RunRecord, Path]:
    """Run what ``config`` asks for, or find it finished; returns its record and its folder OUT.

    Args:
        multirun: OUT is the run's own folder within ``paths.output_dir``.
        bases: from several runs in one process: where the model that they start from is kept.

    Raises:
        BusyError: another process is at this run.
        CfspError: an input is wrong (nothing was started), or a stage failed (the record says which).
    """
    prepared = prepare(config, held=bases.held if bases is not None else 0)
    parent = Path(config.paths.output_dir)
    out = parent / prepared.run_id if multirun else parent
    _check_owner(out, prepared.run_id, force=config.force)
    if config.save.model and config.pruner.instance.prunes:
        for name in ("model", "pruned") if config.recovery.instance.trains else ("model",):
            check_destination(out / name)
        if config.save.format != "hf":
            check_place(place_beside(out / "model", config.save.format), config.save.format)
    with contextlib.ExitStack() as until_the_end:
        for place in (out / LEASE, prepared.progress.with_name(f"{prepared.run_id}.lease")):
            lease = take(place)
            if lease is None:
                who = holder(place) or "another process"
                raise BusyError(f"paths.output_dir={out}: {who} is at this run ({prepared.run_id}); wait for it")
            until_the_end.callback(lease.release)
        return _run(prepared, out, bases or BaseModels()), out


def _run(prepared: Prepared, out: Path, bases: BaseModels) -> RunRecord:
    config = prepared.config
    earlier = RunRecord.read(out / "record.json")
    if earlier is not None and not config.force and _is_finished(earlier, out, prepared):
        shutil.rmtree(prepared.progress, ignore_errors=True)  # it was killed after its record and before this
        copy = Path(config.paths.records_dir) / f"{earlier.run_id}.json"
        if _lacks_export(earlier, out, config):  # the saved model does not depend on the format of its export
            log.info("this run is finished (%s); its export as %s is made", out / "record.json", config.save.format)
            earlier.checkpoint = {**(earlier.checkpoint or {}), "export": _export(config.save.format, out)}
            earlier.write(out / "record.json")
            _mirror(config, earlier, out)
            earlier.write(copy)
            return earlier
        log.info("this run is finished (%s); force=true repeats it", out / "record.json")
        if not _is_copied(copy):
            _mirror(config, earlier, out)
            earlier.write(copy)
        return earlier
    record = RunRecord(
        prepared.run_id,
        configuration=config.raw,
        identity=prepared.identity,
        method=method_of(config),
        environment=environment.describe(),
        model={
            "name": config.model.name,
            "origin": prepared.source.origin,
            "fingerprint": prepared.source.fingerprint,
            "dtype": str(prepared.dtype).removeprefix("torch."),
            "device": str(prepared.device),
        },
        started=_now(),
    )
    if config.force:
        shutil.rmtree(prepared.progress, ignore_errors=True)
    # A repeated run must not cost the record of its success: until it ends well, its own stands beside it.
    repeated = earlier is not None and earlier.status == "success"
    unfinished = out / ("record.repeat.json" if repeated else "record.json")
    with _log_file(out), _recorded(record, out, prepared, unfinished):
        record.write(unfinished)
        _write_config(config, out)
        config.logger.instance.start(prepared.run_id, out, config.raw)
        _execute(prepared, record, out, config.logger.instance.log, bases)
    return record


def _execute(
    prepared: Prepared,
    record: RunRecord,
    out: Path,
    report: Callable[[dict[str, Any]], None],
    bases: BaseModels,
) -> None:
    stages = Stages()
    record.stages = stages.entries
    with contextlib.ExitStack() as until_the_end:
        with stages("load") as stage:
            model, stage["cached"] = until_the_end.enter_context(bases.lent(prepared))
            view = resolve(model)
            pruner = prepared.config.pruner.instance
            bases.probe(view, heads=removes_heads(pruner), experts=removes_experts(pruner))
        _stages(prepared, record, out, report, model, view, stages)


def _stages(
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
            record.measurements["dense"], stage["cached"] = _evaluate_dense(prepared, model)
            _add(record.measurements, _side_by_side(prepared, model, [_side("dense", prepared)]))
        return
    with stages("calibrate") as stage, saved_seconds(stage):
        context, stage["cached"] = _context(prepared, view)
        record.calibration = {**context.calibration.describe(), "batch_size": context.driver.batch_size}
    with stages("plan") as stage, saved_seconds(stage):
        plan, stage["cached"] = read_or_compute(
            prepared.progress / "plan.json",
            PruningPlan.load,
            lambda: config.pruner.instance.plan(context),
            PruningPlan.save,
        )
        plan.save(out / "plan.json")
        _record_plan(record, plan)
    if prepared.evaluation:
        with stages("evaluate dense") as stage:
            record.measurements["dense"], stage["cached"] = _evaluate_dense(prepared, model)
        if config.evaluate_selection and plan.tensors:
            with stages("evaluate selected"), sliced(view, plan.blocks):
                record.measurements["selected"] = _measured(prepared, model, "selected")
    compared = any(evaluator.instance.side_by_side for evaluator in config.evaluation.values())
    # It keeps the dense weights, so only where somebody needs them: a teacher, the dense side of a comparison.
    as_it_was = Snapshot(model) if compared or config.recovery.instance.trains else None
    with stages("apply"):
        apply(model, plan)
    round_to_stored(model, prepared.stored_dtype)
    sides = ["pruned"]
    if config.recovery.instance.trains:
        if prepared.evaluation:
            with stages("evaluate pruned"):
                record.measurements["pruned"] = _measured(prepared, model, "pruned")
        with stages("recover"):
            assert as_it_was is not None
            base = partial(_save_base, prepared, model, plan, out, _facts(prepared, plan, record))
            recovered = recover(prepared, as_it_was, context, plan, out, base=base, report=report)
            model, record.recovery = recovered.model, recovered.record
            round_to_stored(model, prepared.stored_dtype)
        sides.append("recovered")
    if config.save.model:
        with stages("save"):
            state = "recovered" if "recovered" in sides else _state(plan)
            facts = _facts(prepared, plan, record)
            saved = _save(prepared, model, plan, out / "model", state, facts)
            record.checkpoint = {"form": saved.form, "bytes": saved.bytes, "dtype": saved.dtype, "state": state}
    if prepared.evaluation:
        with stages(f"evaluate {sides[-1]}"):
            record.measurements[sides[-1]] = _measured(prepared, model, sides[-1])
        with stages("measure cost"):
            # A recovery trains weights that the three share; what they cost does not depend on the values.
            dense = [Side("dense", as_it_was.active, prepared.stored_dtype)] if as_it_was is not None else []
            _add(record.measurements, _side_by_side(prepared, model, [*dense, *(_side(s, prepared) for s in sides)]))
    if config.save.model and record.checkpoint:
        card.write_card(out / "model", _facts(prepared, plan, record), record.checkpoint["form"])
        if config.save.format != "hf":  # after the figures, which its card shows and its failure must not cost
            with stages("export"):
                record.checkpoint["export"] = _export(config.save.format, out)
    draw_blocks(plan, _distance_shown(config), out / "blocks.png")
    if record.recovery and record.recovery.get("history"):
        draw_recovery(record.recovery, out / "recovery.png")


def _export(form: str, out: Path) -> dict[str, Any]:
    result = exported(Request(out / "model", form))
    for note in result.notes:
        log.info("%s: %s", form, note)
    return {"place": result.place.name, "form": form, "bytes": result.bytes, "notes": list(result.notes)}


def _facts(prepared: Prepared, plan: PruningPlan, record: RunRecord) -> dict[str, Any]:
    recovered = bool(record.recovery)
    source = prepared.source
    hub = source.fingerprint.removeprefix("hub:").partition("@")[0] if source.fingerprint.startswith("hub:") else None
    return card.facts_of_run(
        base_model=(hub or source.folder.resolve().name).rpartition("/")[2],
        hub_id=hub,
        licence=card.licence_of(source.folder),
        plan=plan,
        calibration=record.calibration or {},
        state="recovered" if recovered else _state(plan),
        recovery=prepared.config.recovery.instance.name if recovered else None,
        measurements=record.measurements if "pruned" in record.measurements else None,
        earlier=card.read_facts(source.folder),
    )


def _save(
    prepared: Prepared,
    model: Any,
    plan: PruningPlan,
    folder: Path,
    state: str,
    facts: dict[str, Any],
) -> SavedCheckpoint:
    files = _plan_in_folder(plan, prepared).files(tensors=COMPENSATION_IN_FOLDER)
    form = "remote_code" if model.config.model_type.startswith(PRUNED_PREFIX) else "plain"
    files |= card.card_files(facts, form, folder.name)
    dtype, source = prepared.stored_dtype, prepared.source.folder
    return save_checkpoint(model, folder, dtype=dtype, source=source, state=state, files=files)


def _save_base(prepared: Prepared, model: Any, plan: PruningPlan, out: Path, facts: dict[str, Any]) -> Path | None:
    """The pruned model without what is learnt, which an adapter stands on; None where no model is to be saved."""
    if not prepared.config.save.model:
        return None
    return _save(prepared, model, plan, out / "pruned", _state(plan), facts).folder


def _state(plan: PruningPlan) -> str:
    return "compensated" if plan.tensors else "pruned"


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


def _evaluate_dense(prepared: Prepared, model: nn.Module) -> tuple[list[dict[str, Any]], bool]:
    """Figures of the model as given, read back where this model and evaluation were measured before."""
    rows: list[dict[str, Any]] = []
    all_cached = True
    for name, evaluator in prepared.config.evaluation.items():
        if evaluator.instance.side_by_side:
            continue
        packages = {
            k: v for k, v in environment.versions().items() if k in ("cfsp", "torch", "transformers", "lm-eval")
        }
        key = digest(
            {
                "model": prepared.source.fingerprint,
                "dtype": str(prepared.dtype),
                "device": prepared.device.type,
                "evaluator": evaluator.target,
                "source": evaluator.identity().get("source"),
                "inputs": prepared.evaluation[name],
                "packages": packages,
                "version": METHOD_VERSION,
            }
        )
        folder = Path(prepared.config.paths.cache_dir) / "dense"
        for part, alone in parts_of(evaluator.instance).items():
            path = folder / f"{digest([key, part])[:32]}.json"
            if prepared.config.force:
                path.unlink(missing_ok=True)
            found, cached = _figures(path, alone, model, prepared.tokenizer)
            all_cached &= cached
            rows += found
    return rows, all_cached and bool(rows)


def _measured(prepared: Prepared, model: nn.Module, side: str) -> list[dict[str, Any]]:
    """Figures of one side; what a killed run had measured of it is read."""
    rows: list[dict[str, Any]] = []
    for name, evaluator in prepared.config.evaluation.items():
        if evaluator.instance.side_by_side:
            continue
        for part, alone in parts_of(evaluator.instance).items():
            path = prepared.progress / "measured" / f"{digest([side, name, part])[:32]}.json"
            rows += _figures(path, alone, model, prepared.tokenizer)[0]
    return rows


def _figures(path: Path, evaluator: Any, model: nn.Module, tokenizer: Any) -> tuple[list[dict[str, Any]], bool]:
    return read_or_compute(
        path,
        lambda file: json.loads(file.read_text(encoding="utf-8")),
        lambda: [measurement.as_dict() for measurement in evaluator.measure(model, tokenizer)],
        lambda values, file: file.write_text(json.dumps(values), encoding="utf-8"),
    )


def _side_by_side(prepared: Prepared, model: nn.Module, sides: list[Side]) -> dict[str, list[Measurement]]:
    found: dict[str, list[Measurement]] = {}
    for evaluator in prepared.config.evaluation.values():
        if evaluator.instance.side_by_side:
            for side, rows in evaluator.instance.measure_sides(model, sides).items():
                found.setdefault(side, []).extend(rows)
    return found


def _side(name: str, prepared: Prepared) -> Side:
    return Side(name, contextlib.nullcontext, prepared.stored_dtype)


def _add(measurements: dict[str, list[dict[str, Any]]], found: dict[str, list[Measurement]]) -> None:
    for side, rows in found.items():
        measurements.setdefault(side, []).extend(row.as_dict() for row in rows)


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


def _plan_in_folder(plan: PruningPlan, prepared: Prepared) -> PruningPlan:
    """The folder's plan starts from the first dense model: pruning a pruned folder composes the two plans."""
    earlier = prepared.source.folder / "plan.json"
    if prepared.source.state == "recovered":  # its weights are not those that the earlier plan gives
        return plan
    return plan.compose(PruningPlan.load(earlier)) if earlier.is_file() else plan


def _distance_shown(config: RunConfig) -> str:
    return config.allocator.instance.block_distance() or "angular"


def _check_owner(out: Path, run_id: str, *, force: bool = False) -> None:
    """Make OUT, or find it ours; another run's folder is refused. ``force`` sets a record aside that cannot be read."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe_file = out / f".write-test-{os.getpid()}"
        probe_file.touch()
        probe_file.unlink()
    except OSError as error:
        raise CheckpointError(
            f"paths.output_dir={out}: cannot be written ({error.strerror}); give another folder"
        ) from error
    try:
        earlier = RunRecord.read(out / "record.json")
    except CheckpointError:
        if not force:
            raise
        os.replace(out / "record.json", out / "record.unreadable.json")
        earlier = None
    if earlier is not None and earlier.run_id != run_id:
        raise ConfigError(
            f"paths.output_dir={out}: holds another run ({earlier.run_id}; this one is {run_id}); give another folder "
            "or remove it"
        )


def _is_copied(copy: Path) -> bool:
    """Whether the record is there, whole and of a success."""
    try:
        found = RunRecord.read(copy)
    except CheckpointError:
        return False
    return found is not None and found.succeeded


def _is_finished(earlier: RunRecord, out: Path, prepared: Prepared) -> bool:
    if not earlier.succeeded or not (prepared.config.save.model and prepared.config.pruner.instance.prunes):
        return earlier.succeeded
    return (out / "model" / "config.json").is_file()


def _lacks_export(earlier: RunRecord, out: Path, config: RunConfig) -> bool:
    """Whether the asked format is not there beside the model of a finished run."""
    if config.save.format == "hf" or not (config.save.model and config.pruner.instance.prunes):
        return False
    export = (earlier.checkpoint or {}).get("export") or {}
    return export.get("form") != config.save.format or not (out / export["place"]).exists()


@contextlib.contextmanager
def _recorded(record: RunRecord, out: Path, prepared: Prepared, unfinished: Path) -> Iterator[None]:
    """What happens inside ends up in a record: in ``unfinished`` until it ends well, then in record.json."""
    config = prepared.config
    try:
        yield
    except BaseException as error:
        record.status = "failed"
        record.error = {
            "type": type(error).__name__,
            "message": str(error),
            "traceback": "".join(traceback.format_exception(error)),
        }
        log.debug("run failed", exc_info=error)
        record.finished = _now()
        record.write(unfinished)
        _mirror(config, record, out)
        if _out_of_memory(error):
            raise RunError(_out_of_memory_hint(config, record)) from error
        raise
    record.status, record.error = "success", None
    record.finished = _now()
    record.write(out / "record.json")
    _mirror(config, record, out)  # before the copy, whose absence says that this is still to be done
    shutil.rmtree(prepared.progress, ignore_errors=True)
    if unfinished.name != "record.json":
        unfinished.unlink()
    record.write(Path(config.paths.records_dir) / f"{record.run_id}.json")


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _out_of_memory_hint(config: RunConfig, record: RunRecord) -> str:
    if record.stages and record.stages[-1]["name"] == "recover":
        recovery = config.recovery.instance
        stated = recovery.memory_advice()
        return f"out of memory: {stated or f'use model.dtype=bfloat16; more is not stated by recovery={recovery.name}'}"
    hint = "out of memory: lower calibration.batch_size and the evaluation's batch_size (e.g. 1), or use "
    if "gradients" in required(config.importance.instance):
        return f"{hint}importance.gradient_checkpointing=true, fewer calibration.n_samples or model.dtype=bfloat16"
    sampled = isinstance(config.calibration, SelfCalibration) and config.pruner.instance.prunes
    # What streaming refuses is no way out.
    streams = config.model.streaming != "on" and not sampled and not config.recovery.instance.trains
    return f"{hint}{'model.streaming=on (the weights stay on disk) or ' if streams else ''}model.dtype=bfloat16"


@contextlib.contextmanager
def _log_file(out: Path) -> Iterator[None]:
    handler = logging.FileHandler(out / "run.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def _write_config(config: RunConfig, out: Path) -> None:
    from omegaconf import OmegaConf

    (out / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config.raw)), encoding="utf-8")


def _mirror(config: RunConfig, record: RunRecord, out: Path) -> None:
    """The record is the truth: what is wrong with its mirror costs no run."""
    try:
        config.logger.instance.finish(record, out)
    except Exception as error:
        log.warning(
            "logger: %s could not be finished (%s: %s); the run is whole without it",
            config.logger.instance.__class__.__name__,
            type(error).__name__,
            " ".join(str(error).split()),
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
