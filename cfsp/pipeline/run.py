"""Execution of one run: ownership of OUT, resuming, loading of the model, the stages, and the record."""

from __future__ import annotations

import contextlib
import logging
import shutil
from pathlib import Path

from cfsp.architecture.views import resolve
from cfsp.checkpoint.save import check_destination
from cfsp.config.identity import method_of
from cfsp.config.run_config import RunConfig
from cfsp.errors import BusyError, ConfigError
from cfsp.export.write import check_place, place_beside
from cfsp.pipeline.base_models import BaseModels
from cfsp.pipeline.current_run import Run
from cfsp.pipeline.outcome import mirror_record, output_folders, record_outcome, utc_now, write_config
from cfsp.pipeline.ownership import check_owner, is_copied, restore_model_markers, saves_pruned_model
from cfsp.pipeline.preflight import Prepared, prepare
from cfsp.pipeline.save import export_model
from cfsp.pipeline.stages import model_code_errors, run_stages
from cfsp.pruner.base import removes_experts, removes_heads
from cfsp.record import environment
from cfsp.record.finished import export_files, export_problem, find_run_damage
from cfsp.record.out_folder import OutFolder, check_apart, check_entries, log_file, remove_empty, remove_leftovers
from cfsp.record.run_record import RunRecord
from cfsp.record.written import MODEL_FOLDERS, PLAN_FILES, describe_files
from cfsp.system.lease import holder, take
from cfsp.system.storage import explained

log = logging.getLogger(__name__)

#: Name of the lease file in OUT, which names the process that executes the run.
LEASE = ".lease"


def run(config: RunConfig, *, multirun: bool = False, base_models: BaseModels | None = None) -> tuple[RunRecord, Path]:
    """Execute the run of a configuration, unless it is finished already.

    Args:
        config: the checked configuration.
        multirun: whether OUT is the folder of this run inside ``paths.output_dir``, not ``paths.output_dir`` itself.
        base_models: pool that keeps the base model between several runs of one process.

    Returns:
        The record, and the folder OUT.

    Raises:
        BusyError: another process is executing this run.
        CfspError: an input is wrong (nothing was started), or a stage failed (the record names the stage).
    """
    prepared = prepare(config, reclaimable_bytes=base_models.weight_bytes if base_models is not None else 0)
    parent = Path(config.paths.output_dir)
    out = parent / prepared.run_id if multirun else parent
    _check_output(prepared, out)
    with explained(output_folders(config, out)), contextlib.ExitStack() as exit_stack:
        for place in (out / LEASE, prepared.progress.with_name(f"{prepared.run_id}.lease")):
            lease = take(place)
            if lease is None:
                owner = holder(place) or "another process"
                raise BusyError(
                    f"paths.output_dir={out}: {owner} is executing this run ({prepared.run_id}); wait for it"
                )
            exit_stack.callback(lease.release)
        remove_leftovers(out, Path(config.paths.records_dir), prepared.run_id)
        earlier = RunRecord.read(out / "record.json")
        if earlier is not None and _is_finished(earlier, config, out):
            # The folder remains if the run was killed right after it wrote its record.
            shutil.rmtree(prepared.progress, ignore_errors=True)
            return _complete_finished(earlier, config, out), out
        return _run(prepared, out, earlier, base_models or BaseModels()), out


def _check_output(prepared: Prepared, out: Path) -> None:
    """Check that OUT belongs to this run and that the run may write its model and export there."""
    config = prepared.config
    try:
        check_apart(out, prepared.source.folder)
        check_entries(out)
    except ConfigError:
        remove_empty(out, prepared.source.folder)
        raise
    check_owner(out, prepared.run_id, force=config.force)
    if not saves_pruned_model(config):
        return
    restore_model_markers(out)
    for name in ("model", "pruned") if config.recovery.instance.trains else ("model",):
        check_destination(out / name)
    if config.save.format != "hf":
        check_place(place_beside(out / "model", config.save.format), config.save.format)


def _is_finished(earlier: RunRecord, config: RunConfig, out: Path) -> bool:
    """Return whether the run in OUT succeeded, has all its files undamaged, and is not to be repeated."""
    if not earlier.succeeded or config.force:
        return False
    damaged = find_run_damage(earlier, out, model=saves_pruned_model(config), hashes=config.check_files)
    if damaged is not None:
        log.warning("%s: not finished, %s; the run is done again", out, damaged)
    return damaged is None


def _complete_finished(earlier: RunRecord, config: RunConfig, out: Path) -> RunRecord:
    """Add the requested export and the copy of the record to a finished run if they are missing."""
    copy = Path(config.paths.records_dir) / f"{earlier.run_id}.json"
    format_name = config.save.format
    missing = None
    # The saved model does not depend on the format of its export.
    if format_name != "hf" and saves_pruned_model(config):
        missing = export_problem(earlier, out, format_name, hashes=config.check_files)
    if missing is not None:
        log.info("this run is finished (%s); its export as %s is made: %s", out / "record.json", format_name, missing)
        earlier.checkpoint = {**(earlier.checkpoint or {}), "export": export_model(format_name, out)}
        if earlier.files is not None:
            earlier.files |= describe_files(out, export_files(earlier.checkpoint["export"]["place"]))
        earlier.write(out / "record.json")
    else:
        log.info("this run is finished (%s); force=true repeats it", out / "record.json")
    if missing is not None or not is_copied(copy):
        mirror_record(config, earlier, out)
        earlier.write(copy)
    return earlier


def _run(prepared: Prepared, out: Path, earlier: RunRecord | None, base_models: BaseModels) -> RunRecord:
    """Execute the run from the start, or resume a killed run of the same id; return the record."""
    config = prepared.config
    record = _new_record(prepared)
    if config.force:
        shutil.rmtree(prepared.progress, ignore_errors=True)
    # A repetition that fails must not replace the record of an earlier success, so it has a file of its own until then.
    repeated = earlier is not None and earlier.status == "success"
    unfinished = out / ("record.repeat.json" if repeated else "record.json")
    this_run = Run(prepared, record, OutFolder(out))
    with log_file(out / "run.log"), record_outcome(this_run, unfinished):
        record.write(unfinished)
        write_config(config, out)
        config.logger.instance.start(prepared.run_id, out, config.raw)
        _execute(this_run, base_models)
    return record


def _new_record(prepared: Prepared) -> RunRecord:
    """Return the initial record of a run that starts now."""
    config = prepared.config
    return RunRecord(
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
            **({"gguf": prepared.source.gguf.facts} if prepared.source.gguf is not None else {}),
            **({"quantised": prepared.source.quantised.facts} if prepared.source.quantised is not None else {}),
            **({"notes": list(prepared.notes)} if prepared.notes else {}),
        },
        started=utc_now(),
    )


def _execute(this_run: Run, base_models: BaseModels) -> None:
    """Load the base model, run the stages, and record the sizes and hashes of the files that they wrote."""
    prepared, record, folder = this_run.prepared, this_run.record, this_run.folder
    with contextlib.ExitStack() as exit_stack:
        with this_run.stages("load") as stage, model_code_errors(prepared):
            for note in prepared.notes:
                log.warning("%s", note)
            model, stage["cached"] = exit_stack.enter_context(base_models.acquire(prepared))
            view = resolve(model)
            pruner = prepared.config.pruner.instance
            base_models.probe(
                view, heads=removes_heads(pruner), experts=removes_experts(pruner), prunes=bool(pruner.prunes)
            )
        run_stages(this_run, model, view)
    written = ["plan.json"] if record.plan else []
    written += ["model/config.json"] if record.checkpoint else []
    folder.check(["config.yaml", "run.log", *written])
    record.files = describe_files(folder.path, _recorded_entries(record))


def _recorded_entries(record: RunRecord) -> list[str]:
    """Return the files and folders of OUT that this run wrote and that the record describes."""
    names = list(PLAN_FILES) if record.plan else []
    if record.checkpoint:
        names += MODEL_FOLDERS if record.recovery else MODEL_FOLDERS[:1]
        export = record.checkpoint.get("export")
        names += export_files(export["place"]) if export else ()
    return names
