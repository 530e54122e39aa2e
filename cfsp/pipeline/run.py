"""Run a configuration: ownership of OUT, resuming what is finished, loading, the stages, the record."""

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
from cfsp.pipeline.outcome import mirror_record, now, places_of, recorded, write_config
from cfsp.pipeline.ownership import allow_replacing, check_owner, is_copied, wants_model
from cfsp.pipeline.preflight import Prepared, prepare
from cfsp.pipeline.save import export_model
from cfsp.pipeline.stages import model_code, run_stages
from cfsp.pruner.base import removes_experts, removes_heads
from cfsp.record import environment
from cfsp.record.finished import export_files, lacking, lacking_export
from cfsp.record.out_folder import OutFolder, check_apart, check_entries, log_file, remove_empty, remove_leftovers
from cfsp.record.run_record import RunRecord
from cfsp.record.written import MODEL_FOLDERS, PLAN_FILES, describe_files
from cfsp.system.lease import holder, take
from cfsp.system.storage import explained

log = logging.getLogger(__name__)

#: Name of the file in OUT that says which process is at the run.
LEASE = ".lease"


def run(config: RunConfig, *, multirun: bool = False, bases: BaseModels | None = None) -> tuple[RunRecord, Path]:
    """Run what ``config`` asks for, unless it is finished; returns its record and its folder OUT.

    Args:
        config: the composed configuration.
        multirun: OUT is the run's own folder within ``paths.output_dir``.
        bases: keeps the base model between several runs of one process.

    Raises:
        BusyError: another process is at this run.
        CfspError: an input is wrong (nothing was started), or a stage failed (the record says which).
    """
    prepared = prepare(config, held=bases.held if bases is not None else 0)
    parent = Path(config.paths.output_dir)
    out = parent / prepared.run_id if multirun else parent
    _check_places(prepared, out)
    with explained(places_of(config, out)), contextlib.ExitStack() as until_the_end:
        for place in (out / LEASE, prepared.progress.with_name(f"{prepared.run_id}.lease")):
            lease = take(place)
            if lease is None:
                who = holder(place) or "another process"
                raise BusyError(f"paths.output_dir={out}: {who} is at this run ({prepared.run_id}); wait for it")
            until_the_end.callback(lease.release)
        remove_leftovers(out, Path(config.paths.records_dir), prepared.run_id)
        earlier = RunRecord.read(out / "record.json")
        if earlier is not None and _is_finished(earlier, config, out):
            shutil.rmtree(prepared.progress, ignore_errors=True)  # it was killed after its record and before this
            return _complete(earlier, config, out), out
        return _run(prepared, out, earlier, bases or BaseModels()), out


def _check_places(prepared: Prepared, out: Path) -> None:
    """See that OUT belongs to this run, and that the run may write what it writes there."""
    config = prepared.config
    try:
        check_apart(out, prepared.source.folder)
        check_entries(out)
    except ConfigError:
        remove_empty(out, prepared.source.folder)
        raise
    check_owner(out, prepared.run_id, force=config.force)
    if not wants_model(config):
        return
    allow_replacing(out)
    for name in ("model", "pruned") if config.recovery.instance.trains else ("model",):
        check_destination(out / name)
    if config.save.format != "hf":
        check_place(place_beside(out / "model", config.save.format), config.save.format)


def _is_finished(earlier: RunRecord, config: RunConfig, out: Path) -> bool:
    """Return whether the record in OUT is of a success, is not to be repeated, and all its files are whole."""
    if not earlier.succeeded or config.force:
        return False
    damaged = lacking(earlier, out, model=wants_model(config), hashes=config.check_files)
    if damaged is not None:
        log.warning("%s: not finished, %s; the run is done again", out, damaged)
    return damaged is None


def _complete(earlier: RunRecord, config: RunConfig, out: Path) -> RunRecord:
    """Supply what a finished run still lacks: the export in the format asked for, the copy of its record."""
    copy = Path(config.paths.records_dir) / f"{earlier.run_id}.json"
    format_name = config.save.format
    lost = None
    if format_name != "hf" and wants_model(config):  # the saved model does not depend on the format of its export
        lost = lacking_export(earlier, out, format_name, hashes=config.check_files)
    if lost is not None:
        log.info("this run is finished (%s); its export as %s is made: %s", out / "record.json", format_name, lost)
        earlier.checkpoint = {**(earlier.checkpoint or {}), "export": export_model(format_name, out)}
        if earlier.files is not None:
            earlier.files |= describe_files(out, export_files(earlier.checkpoint["export"]["place"]))
        earlier.write(out / "record.json")
    else:
        log.info("this run is finished (%s); force=true repeats it", out / "record.json")
    if lost is not None or not is_copied(copy):
        mirror_record(config, earlier, out)
        earlier.write(copy)
    return earlier


def _run(prepared: Prepared, out: Path, earlier: RunRecord | None, bases: BaseModels) -> RunRecord:
    """Run from the start, or from where a killed run of this id stopped."""
    config = prepared.config
    record = _new_record(prepared)
    if config.force:
        shutil.rmtree(prepared.progress, ignore_errors=True)
    # A repeated run must not cost the record of its success: until it ends well, its own stands beside it.
    repeated = earlier is not None and earlier.status == "success"
    unfinished = out / ("record.repeat.json" if repeated else "record.json")
    this_run = Run(prepared, record, OutFolder(out))
    with log_file(out / "run.log"), recorded(this_run, unfinished):
        record.write(unfinished)
        write_config(config, out)
        config.logger.instance.start(prepared.run_id, out, config.raw)
        _execute(this_run, bases)
    return record


def _new_record(prepared: Prepared) -> RunRecord:
    """Return the record of a run that begins now."""
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
        started=now(),
    )


def _execute(this_run: Run, bases: BaseModels) -> None:
    """Load the base model, run the stages, and describe the files that they wrote."""
    prepared, record, folder = this_run.prepared, this_run.record, this_run.folder
    with contextlib.ExitStack() as until_the_end:
        with this_run.stages("load") as stage, model_code(prepared):
            for note in prepared.notes:
                log.warning("%s", note)
            model, stage["cached"] = until_the_end.enter_context(bases.acquire(prepared))
            view = resolve(model)
            pruner = prepared.config.pruner.instance
            bases.probe(view, heads=removes_heads(pruner), experts=removes_experts(pruner), prunes=bool(pruner.prunes))
        run_stages(this_run, model, view)
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
