"""The record of how a run ended, and the way out that a failure names."""

from __future__ import annotations

import contextlib
import logging
import shutil
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch

from cfsp.config.run_config import RunConfig
from cfsp.config.sections import SelfCalibration
from cfsp.errors import CfspError, RunError
from cfsp.importance.base import required
from cfsp.pipeline.preflight import Prepared
from cfsp.record.out_folder import OutFolder, OutputGoneError
from cfsp.record.run_record import RunRecord
from cfsp.system.atomic import write_text
from cfsp.system.storage import storage_problem

log = logging.getLogger(__name__)


@contextlib.contextmanager
def recorded(record: RunRecord, folder: OutFolder, prepared: Prepared, unfinished: Path) -> Iterator[None]:
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
        record.finished = now()
        gone = folder.is_gone
        if record.checkpoint and not gone:
            record.checkpoint.setdefault("place", "model")
        try:
            record.write(unfinished)
        except OSError as problem:  # the disk that stopped the run
            log.warning("%s: the record of the failure cannot be written (%s)", unfinished, problem.strerror)
        mirror_record(config, record, out)
        explanation = _explanation(error, record, prepared, folder, gone=gone)
        if explanation is None:
            raise
        raise explanation from error
    record.status, record.error = "success", None
    record.finished = now()
    record.write(out / "record.json")
    folder.check()
    mirror_record(config, record, out)  # before the copy, whose absence says that this is still to be done
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


def write_config(config: RunConfig, out: Path) -> None:
    from omegaconf import OmegaConf

    write_text(out / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config.raw)))


def mirror_record(config: RunConfig, record: RunRecord, out: Path) -> None:
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


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
