"""Outcome of a run: the final record, and error messages that name a way out."""

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
from cfsp.config.sections import samples_the_model
from cfsp.errors import CfspError, RunError
from cfsp.importance.base import required_items
from cfsp.pipeline.current_run import Run
from cfsp.record.out_folder import OutFolder, OutputGoneError
from cfsp.record.run_record import RunRecord
from cfsp.system.atomic import write_text
from cfsp.system.storage import storage_problem

log = logging.getLogger(__name__)


@contextlib.contextmanager
def record_outcome(run: Run, unfinished: Path) -> Iterator[None]:
    """Write the outcome of the run inside the context into its record.

    Args:
        run: the current run.
        unfinished: path of the record until the run succeeds. A successful run writes record.json.

    Raises:
        CfspError: the run failed, and there is a way out or a saved model to name.
    """
    record = run.record
    try:
        yield
    except BaseException as error:
        explanation = _record_failure(error, run, unfinished)
        if explanation is None:
            raise
        raise explanation from error
    record.status, record.error = "success", None
    record.finished = utc_now()
    record.write(run.out / "record.json")
    run.folder.check()
    mirror_record(run.config, record, run.out)  # before the copy, because a missing copy triggers the mirror again
    shutil.rmtree(run.prepared.progress, ignore_errors=True)
    if unfinished.name != "record.json":
        unfinished.unlink()
    record.write(Path(run.config.paths.records_dir) / f"{record.run_id}.json")


def _record_failure(error: BaseException, run: Run, unfinished: Path) -> CfspError | None:
    """Write the record of a failed run; return the error to raise instead of ``error``, or None to keep it."""
    record = run.record
    record.status = "failed"
    record.error = {
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
    log.debug("run failed", exc_info=error)
    record.finished = utc_now()
    folder_is_gone = run.folder.is_gone
    if record.checkpoint and not folder_is_gone:
        record.checkpoint.setdefault("place", "model")
    try:
        record.write(unfinished)
    except OSError as problem:  # the disk error that stopped the run may stop this too
        log.warning("%s: the record of the failure cannot be written (%s)", unfinished, problem.strerror)
    mirror_record(run.config, record, run.out)
    return _explanation(error, run, gone=folder_is_gone)


def _explanation(error: BaseException, run: Run, *, gone: bool) -> CfspError | None:
    """Return the error to raise instead of ``error``; None if ``error`` itself says enough."""
    config, record, folder, code = run.config, run.record, run.folder, 1
    if not isinstance(error, Exception):
        return None
    if gone and not isinstance(error, OutputGoneError):
        try:
            OutFolder.check(folder)
        except OutputGoneError as missing:
            return missing
        return OutputGoneError(f"paths.output_dir={folder.path}: was removed while the run went on; start it again")
    message: str | None
    if _out_of_memory(error):
        message = _out_of_memory_hint(config, record)
    else:
        message = storage_problem(error, output_folders(config, folder.path))
    if not record.checkpoint or gone or isinstance(error, OutputGoneError):
        return None if message is None else RunError(message)
    if message is None and isinstance(error, CfspError):
        message, code = str(error), error.exit_code
    elif message is None:
        reason = " ".join(str(error).split()) or type(error).__name__
        message = f"the run failed ({type(error).__name__}: {reason}); debug=true shows where"
    state = record.checkpoint.get("state", "pruned")
    explained = RunError(f"{message}; the {state} model is kept in {folder.path / record.checkpoint['place']}")
    explained.exit_code = code
    return explained


def output_folders(config: RunConfig, out: Path) -> dict[str, Path]:
    """Return the folders that a run writes: configuration key -> folder."""
    return {
        "paths.output_dir": out,
        "paths.cache_dir": Path(config.paths.cache_dir),
        "paths.records_dir": Path(config.paths.records_dir),
    }


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _out_of_memory_hint(config: RunConfig, record: RunRecord) -> str:
    if record.stages and record.stages[-1]["name"] == "recover":
        recovery = config.recovery.instance
        advice = recovery.memory_advice()
        return f"out of memory: {advice or f'use model.dtype=bfloat16; more is not stated by recovery={recovery.name}'}"
    hint = "out of memory: lower calibration.batch_size and the evaluation's batch_size (e.g. 1), or use "
    if "gradients" in required_items(config.importance.instance):
        return f"{hint}importance.gradient_checkpointing=true, fewer calibration.n_samples or model.dtype=bfloat16"
    sampled = samples_the_model(config.calibration) and config.pruner.instance.prunes
    # Streaming is suggested only where a streamed run would not be refused.
    streams = config.model.streaming != "on" and not sampled and not config.recovery.instance.trains
    return f"{hint}{'model.streaming=on (the weights stay on disk) or ' if streams else ''}model.dtype=bfloat16"


def write_config(config: RunConfig, out: Path) -> None:
    """Write the composed configuration to OUT/config.yaml."""
    from omegaconf import OmegaConf

    write_text(out / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config.raw)))


def mirror_record(config: RunConfig, record: RunRecord, out: Path) -> None:
    """Send the record to the logger. An error of the logger is logged only, because the record itself is complete."""
    try:
        config.logger.instance.finish(record, out)
    except Exception as error:
        log.warning(
            "logger: %s could not be finished (%s: %s); the run is whole without it",
            config.logger.instance.__class__.__name__,
            type(error).__name__,
            " ".join(str(error).split()),
        )


def utc_now() -> str:
    """Return the current time in UTC as an ISO 8601 text with seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")
