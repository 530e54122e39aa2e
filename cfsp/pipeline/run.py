"""The order of the stages, what is skipped because it is done, and what happens when one fails. No science."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cfsp.architecture.views import resolve
from cfsp.checkpoint.save import check_destination
from cfsp.config.identity import method_of
from cfsp.config.run_config import RunConfig
from cfsp.errors import BusyError, ConfigError
from cfsp.export.write import check_place, place_beside
from cfsp.pipeline.base_models import BaseModels
from cfsp.pipeline.outcome import mirror_record, now, recorded, write_config
from cfsp.pipeline.ownership import allow_replacing, check_owner, is_copied, wants_model
from cfsp.pipeline.preflight import Prepared, prepare
from cfsp.pipeline.save import export_model
from cfsp.pipeline.stages import model_code, run_stages
from cfsp.pruner.base import removes_experts, removes_heads
from cfsp.record import environment
from cfsp.record.finished import export_files, lacking, lacking_export
from cfsp.record.out_folder import OutFolder, check_apart, check_entries, log_file, remove_empty, remove_leftovers
from cfsp.record.run_record import RunRecord
from cfsp.record.stages import Stages
from cfsp.record.written import MODEL_FOLDERS, PLAN_FILES, describe_files
from cfsp.system.lease import holder, take
from cfsp.system.storage import explained

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
        check_entries(out)
    except ConfigError:
        remove_empty(out, prepared.source.folder)
        raise
    check_owner(out, prepared.run_id, force=config.force)
    if config.save.model and config.pruner.instance.prunes:
        allow_replacing(out)
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
        damaged = lacking(earlier, out, model=wants_model(config), hashes=config.check_files)
        if damaged is not None:
            log.warning("%s: not finished, %s; the run is done again", out, damaged)
    if earlier is not None and earlier.succeeded and not config.force and damaged is None:
        shutil.rmtree(prepared.progress, ignore_errors=True)  # it was killed after its record and before this
        copy = Path(config.paths.records_dir) / f"{earlier.run_id}.json"
        form = config.save.format
        lost = None
        if form != "hf" and wants_model(config):  # the saved model does not depend on the format of its export
            lost = lacking_export(earlier, out, form, hashes=config.check_files)
        if lost is not None:
            log.info("this run is finished (%s); its export as %s is made: %s", out / "record.json", form, lost)
            earlier.checkpoint = {**(earlier.checkpoint or {}), "export": export_model(form, out)}
            if earlier.files is not None:
                earlier.files |= describe_files(out, export_files(earlier.checkpoint["export"]["place"]))
            earlier.write(out / "record.json")
            mirror_record(config, earlier, out)
            earlier.write(copy)
            return earlier
        log.info("this run is finished (%s); force=true repeats it", out / "record.json")
        if not is_copied(copy):
            mirror_record(config, earlier, out)
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
        started=now(),
    )
    if config.force:
        shutil.rmtree(prepared.progress, ignore_errors=True)
    # A repeated run must not cost the record of its success: until it ends well, its own stands beside it.
    repeated = earlier is not None and earlier.status == "success"
    unfinished = out / ("record.repeat.json" if repeated else "record.json")
    folder = OutFolder(out)
    with log_file(out / "run.log"), recorded(record, folder, prepared, unfinished):
        record.write(unfinished)
        write_config(config, out)
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
        with stages("load") as stage, model_code(prepared):
            for note in prepared.notes:
                log.warning("%s", note)
            model, stage["cached"] = until_the_end.enter_context(bases.lent(prepared))
            view = resolve(model)
            pruner = prepared.config.pruner.instance
            bases.probe(view, heads=removes_heads(pruner), experts=removes_experts(pruner), prunes=bool(pruner.prunes))
        run_stages(prepared, record, folder.path, report, model, view, stages)
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
