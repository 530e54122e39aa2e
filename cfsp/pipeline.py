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
from cfsp.errors import BusyError, CfspError, CheckpointError, ConfigError, RunError
from cfsp.evaluate.base import Side, parts_of, under_its_key
from cfsp.evaluate.measurement import Measurement
from cfsp.evaluate.unchanged import measured_unchanged
from cfsp.export import card
from cfsp.export.command import Request, check_place, exported, place_beside
from cfsp.identity import METHOD_VERSION, digest, method_of
from cfsp.importance.base import required
from cfsp.lease import holder, take
from cfsp.models.base_models import BaseModels
from cfsp.models.checkpoint import MARKER, SavedCheckpoint, check_destination, round_to_stored, save_checkpoint
from cfsp.models.driver import BlockDriver
from cfsp.models.remote_code import PRUNED_PREFIX
from cfsp.models.snapshot import Snapshot
from cfsp.models.trial import model_code_refused
from cfsp.models.views import DecoderView, resolve
from cfsp.prepare import Prepared, prepare
from cfsp.pruning.apply import apply, check_fits, sliced
from cfsp.pruning.base import PlanContext, removes_experts, removes_heads
from cfsp.pruning.context import plan_context
from cfsp.pruning.plan import COMPENSATION_IN_FOLDER, PruningPlan
from cfsp.pruning.plan_history import history_of
from cfsp.record import environment
from cfsp.record.figure import draw_blocks, draw_recovery
from cfsp.record.finished import export_files, lacking, lacking_export
from cfsp.record.out_folder import OutFolder, OutputGoneError, check_apart, log_file, remove_empty, remove_leftovers
from cfsp.record.run_record import RunRecord
from cfsp.record.stages import Stages
from cfsp.record.validation import figure_problem
from cfsp.record.written import MODEL_FOLDERS, PLAN_FILES, describe_files, within
from cfsp.recover.stage import recover
from cfsp.system.atomic import replacing, write_text
from cfsp.system.reading import read_json
from cfsp.system.storage import explained, storage_problem

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
    try:
        check_apart(out, prepared.source.folder)
    except ConfigError:
        remove_empty(out, prepared.source.folder)
        raise
    _check_owner(out, prepared.run_id, force=config.force)
    if config.save.model and config.pruner.instance.prunes:
        _allow_replacing(out)
        for name in ("model", "pruned") if config.recovery.instance.trains else ("model",):
            check_destination(out / name)
        if config.save.format != "hf":
            check_place(place_beside(out / "model", config.save.format), config.save.format)
    places = {
        "paths.output_dir": out,
        "paths.cache_dir": Path(config.paths.cache_dir),
        "paths.records_dir": Path(config.paths.records_dir),
    }
    with explained(places), contextlib.ExitStack() as until_the_end:
        for place in (out / LEASE, prepared.progress.with_name(f"{prepared.run_id}.lease")):
            lease = take(place)
            if lease is None:
                who = holder(place) or "another process"
                raise BusyError(f"paths.output_dir={out}: {who} is at this run ({prepared.run_id}); wait for it")
            until_the_end.callback(lease.release)
        remove_leftovers(out, places["paths.records_dir"], prepared.run_id)
        return _run(prepared, out, bases or BaseModels()), out


def _run(prepared: Prepared, out: Path, bases: BaseModels) -> RunRecord:
    config = prepared.config
    earlier = RunRecord.read(out / "record.json")
    damaged = None
    if earlier is not None and earlier.succeeded and not config.force:
        damaged = lacking(earlier, out, model=_wants_model(config), hashes=config.check_files)
        if damaged is not None:
            log.warning("%s: not finished, %s; the run is done again", out, damaged)
    if earlier is not None and earlier.succeeded and not config.force and damaged is None:
        shutil.rmtree(prepared.progress, ignore_errors=True)  # it was killed after its record and before this
        copy = Path(config.paths.records_dir) / f"{earlier.run_id}.json"
        form = config.save.format
        lost = None
        if form != "hf" and _wants_model(config):  # the saved model does not depend on the format of its export
            lost = lacking_export(earlier, out, form, hashes=config.check_files)
        if lost is not None:
            log.info("this run is finished (%s); its export as %s is made: %s", out / "record.json", form, lost)
            earlier.checkpoint = {**(earlier.checkpoint or {}), "export": _export(form, out)}
            if earlier.files is not None:
                earlier.files |= describe_files(out, export_files(earlier.checkpoint["export"]["place"]))
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
            **({"notes": list(prepared.notes)} if prepared.notes else {}),
        },
        started=_now(),
    )
    if config.force:
        shutil.rmtree(prepared.progress, ignore_errors=True)
    # A repeated run must not cost the record of its success: until it ends well, its own stands beside it.
    repeated = earlier is not None and earlier.status == "success"
    unfinished = out / ("record.repeat.json" if repeated else "record.json")
    folder = OutFolder(out)
    with log_file(out / "run.log"), _recorded(record, folder, prepared, unfinished):
        record.write(unfinished)
        _write_config(config, out)
        config.logger.instance.start(prepared.run_id, out, config.raw)
        _execute(prepared, record, folder, config.logger.instance.log, bases)
    return record


def _execute(
    prepared: Prepared,
    record: RunRecord,
    folder: OutFolder,
    report: Callable[[dict[str, Any]], None],
    bases: BaseModels,
) -> None:
    stages = Stages(after=folder.check)
    record.stages = stages.entries
    with contextlib.ExitStack() as until_the_end:
        with stages("load") as stage, _model_code(prepared):
            for note in prepared.notes:
                log.warning("%s", note)
            model, stage["cached"] = until_the_end.enter_context(bases.lent(prepared))
            view = resolve(model)
            pruner = prepared.config.pruner.instance
            bases.probe(view, heads=removes_heads(pruner), experts=removes_experts(pruner), prunes=bool(pruner.prunes))
        _stages(prepared, record, folder.path, report, model, view, stages)
    written = ["plan.json"] if record.plan else []
    written += ["model/config.json"] if record.checkpoint else []
    folder.check(["config.yaml", "run.log", *written])
    record.files = describe_files(folder.path, _written(record))


def _written(record: RunRecord) -> list[str]:
    """Return the entries of OUT that this run wrote and that others read."""
    names = list(PLAN_FILES) if record.plan else []
    if record.checkpoint:
        names += MODEL_FOLDERS if record.recovery else MODEL_FOLDERS[:1]
        export = record.checkpoint.get("export")
        names += export_files(export["place"]) if export else ()
    return names


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
    with stages("calibrate") as stage, saved_seconds(stage), _model_code(prepared):
        context, stage["cached"] = _context(prepared, view)
        record.calibration = {**context.calibration.describe(), "batch_size": context.driver.batch_size}
    with stages("plan") as stage, saved_seconds(stage), _model_code(prepared):
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
                record.measurements["dense"], stage["cached"] = _evaluate_dense(prepared, model)
            if config.evaluate_selection and plan.tensors:
                with stages("evaluate selected"), sliced(view, plan.blocks):
                    record.measurements["selected"] = _measured(prepared, model, "selected")
    compared = any(evaluator.instance.side_by_side for evaluator in config.evaluation.values())
    # It keeps the dense weights, so only where somebody needs them: a teacher, the dense side of a comparison.
    trains = config.recovery.instance.trains
    as_it_was = Snapshot(model) if not failed and (compared or trains) else None
    with stages("apply"):
        apply(model, plan)
    round_to_stored(model, prepared.stored_dtype)
    if trains and prepared.evaluation and not failed:
        with _postponed(failed, config), stages("evaluate pruned"):
            record.measurements["pruned"] = _measured(prepared, model, "pruned")
    if failed:
        with stages("save"):
            _keep(prepared, model, plan, out / ("pruned" if trains else "model"), record)
        raise failed[0]
    sides = ["pruned"]
    if trains:
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
    state = _state(plan)
    try:
        saved = _save(prepared, model, plan, folder, state, _facts(prepared, plan, record))
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


def _model_code(prepared: Prepared) -> contextlib.AbstractContextManager[None]:
    return model_code_refused(str(prepared.source.config.get("model_type")), prepared.source.origin)


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
                "model": prepared.identity["model"],
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
            with under_its_key(name, evaluator.instance):
                found, cached = _figures(path, name, alone, model, prepared.tokenizer)
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
            with under_its_key(name, evaluator.instance):
                rows += _figures(path, name, alone, model, prepared.tokenizer)[0]
    return rows


def _figures(
    path: Path, name: str, evaluator: Any, model: nn.Module, tokenizer: Any
) -> tuple[list[dict[str, Any]], bool]:
    return read_or_compute(
        path,
        _read_figures,
        lambda: [
            measurement.as_dict()
            for measurement in measured_unchanged(name, model, lambda: evaluator.measure(model, tokenizer))
        ],
        lambda values, file: file.write_text(json.dumps(values), encoding="utf-8"),
    )


def _read_figures(file: Path) -> list[dict[str, Any]]:
    """Read cached figures.

    Raises:
        CfspError, ValueError: damaged ones, which are measured again.
    """
    rows = read_json(file, str(file))
    problem = None if isinstance(rows, list) else "no list of figures"
    problem = problem or next((said for row in rows if (said := figure_problem(row)) is not None), None)
    if problem is not None:
        raise ValueError(problem)
    return rows


def _side_by_side(prepared: Prepared, model: nn.Module, sides: list[Side]) -> dict[str, list[Measurement]]:
    found: dict[str, list[Measurement]] = {}
    for name, evaluator in prepared.config.evaluation.items():
        if evaluator.instance.side_by_side:
            measure = partial(evaluator.instance.measure_sides, model, sides)
            for side, rows in measured_unchanged(name, model, measure).items():
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
    if prepared.source.state == "recovered":  # its weights are not those that the earlier plan gives
        return plan
    earlier = history_of(prepared.source.folder)
    return plan if earlier is None else plan.compose(earlier)


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


def _wants_model(config: RunConfig) -> bool:
    return bool(config.save.model and config.pruner.instance.prunes)


def _allow_replacing(out: Path) -> None:
    """Give a damaged model folder of ours its marker back, without which it could not be replaced."""
    earlier = RunRecord.read(out / "record.json")
    for name in MODEL_FOLDERS[:2]:
        folder, listed = out / name, within(None if earlier is None else earlier.files, [name])
        if f"{name}/{MARKER}" not in listed or not folder.is_dir() or (folder / MARKER).exists():
            continue
        files = [path for path in folder.rglob("*") if not path.is_dir()]
        if all(path.relative_to(out).as_posix() in listed for path in files):  # nothing of anybody else's
            write_text(folder / MARKER, json.dumps({"schema": 1, "state": "damaged"}) + "\n")


@contextlib.contextmanager
def _recorded(record: RunRecord, folder: OutFolder, prepared: Prepared, unfinished: Path) -> Iterator[None]:
    """What happens inside ends up in a record: in ``unfinished`` until it ends well, then in record.json."""
    config, out = prepared.config, folder.path
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
        gone = folder.is_gone
        if record.checkpoint and not gone:
            record.checkpoint.setdefault("place", "model")
        try:
            record.write(unfinished)
        except OSError as problem:  # the disk that stopped the run
            log.warning("%s: the record of the failure cannot be written (%s)", unfinished, problem.strerror)
        _mirror(config, record, out)
        explanation = _explanation(error, record, prepared, folder, gone=gone)
        if explanation is None:
            raise
        raise explanation from error
    record.status, record.error = "success", None
    record.finished = _now()
    record.write(out / "record.json")
    folder.check()
    _mirror(config, record, out)  # before the copy, whose absence says that this is still to be done
    shutil.rmtree(prepared.progress, ignore_errors=True)
    if unfinished.name != "record.json":
        unfinished.unlink()
    record.write(Path(config.paths.records_dir) / f"{record.run_id}.json")


def _explanation(
    error: BaseException, record: RunRecord, prepared: Prepared, folder: OutFolder, *, gone: bool
) -> CfspError | None:
    """Return the error to be shown in the place of ``error``; None where that says all there is to say."""
    config, said, code = prepared.config, None, 1
    if not isinstance(error, Exception):
        return None
    if gone and not isinstance(error, OutputGoneError):
        try:
            OutFolder.check(folder)
        except OutputGoneError as lost:
            return lost
        return OutputGoneError(f"paths.output_dir={folder.path}: was removed while the run went on; start it again")
    places = {
        "paths.output_dir": folder.path,
        "paths.cache_dir": Path(config.paths.cache_dir),
        "paths.records_dir": Path(config.paths.records_dir),
    }
    if _out_of_memory(error):
        said = _out_of_memory_hint(config, record)
    else:
        said = storage_problem(error, places)
    if not record.checkpoint or gone or isinstance(error, OutputGoneError):
        return None if said is None else RunError(said)
    if said is None and isinstance(error, CfspError):
        said, code = str(error), error.exit_code
    elif said is None:
        reason = " ".join(str(error).split()) or type(error).__name__
        said = f"the run failed ({type(error).__name__}: {reason}); debug=true shows where"
    state = record.checkpoint.get("state", "pruned")
    shown = RunError(f"{said}; the {state} model is kept in {folder.path / record.checkpoint['place']}")
    shown.exit_code = code
    return shown


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


def _write_config(config: RunConfig, out: Path) -> None:
    from omegaconf import OmegaConf

    write_text(out / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config.raw)))


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
