"""All that can be refused cheaply: model folder, structure, budget, data, tasks. No weight is loaded here."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cfsp.architecture.views import DecoderView
from cfsp.calibration import calibration_set as calibration_data
from cfsp.calibration.calibration_set import CalibrationSet
from cfsp.config.components import NAMING, option_of
from cfsp.config.identity import identity_of, run_id_of
from cfsp.config.run_config import RunConfig
from cfsp.config.sections import SelfCalibration, TextCalibration, TokensCalibration
from cfsp.data.limits import Limits
from cfsp.errors import CfspError, ConfigError, DataError
from cfsp.evaluation.base import under_its_key
from cfsp.export.check import check_exportable
from cfsp.importance.base import required
from cfsp.model.device import resolve_device, resolve_dtype
from cfsp.model.outline import changed_by_tensors, outline
from cfsp.model.tokenizer import load_tokenizer
from cfsp.plan.check import sizes_of
from cfsp.plan.history import check_history
from cfsp.pruned_model.adopt import check_adoptable
from cfsp.system.memory import available
from cfsp.weights.source import ModelSource, locate

#: Weights that take more of the free memory leave too little for what a pass holds beside them.
_SHARE_OF_MEMORY = 0.8


@dataclass(frozen=True)
class Prepared:
    """A run that has passed its checks. ``calibration``: None where sampled from the model, or not needed."""

    config: RunConfig
    source: ModelSource
    tokenizer: Any
    limits: Limits
    device: torch.device
    dtype: torch.dtype
    stored_dtype: torch.dtype
    streaming: bool
    calibration: CalibrationSet | None
    evaluation: dict[str, dict[str, Any]]
    identity: dict[str, Any]
    run_id: str
    #: Sentences on what the weights say against config.json; in the record.
    notes: tuple[str, ...] = ()

    @property
    def progress(self) -> Path:
        """Where the run keeps what it need not do again after a kill, wherever OUT is: plan, figures, training."""
        return Path(self.config.paths.cache_dir) / "progress" / self.run_id


def prepare(config: RunConfig, *, held: int = 0) -> Prepared:
    """Find and check every input of a run.

    Args:
        held: bytes of memory that a base model kept from an earlier run takes, which this run may have.

    Raises:
        CfspError: what is wrong, with the key and the way out; inputs that do not depend on each other are
            all looked at before one is refused.
    """
    problems: list[CfspError] = []
    device = source = None
    with _collected(problems):
        device = resolve_device(config.model.device)
    with _collected(problems):
        source = locate(config.model, Path(config.paths.cache_dir) / "digests")
    for key, folder in (("cache_dir", config.paths.cache_dir), ("records_dir", config.paths.records_dir)):
        with _collected(problems):
            check_writable(f"paths.{key}", Path(folder))
    _refuse(problems)
    assert device is not None
    assert source is not None
    trust = config.model.trust_remote_code
    view = outline(source, trust_remote_code=trust)
    limits = Limits(view.model.get_input_embeddings().weight.shape[0], source.positions)
    tokenizer = load_tokenizer(source, trust_remote_code=trust)
    calibration, calibration_identity = None, None
    if config.pruner.instance.prunes:
        with _collected(problems):
            check_history(source.folder, sizes_of(view))
        with _collected(problems):
            check_adoptable(view.model)
        with _collected(problems):
            config.pruner.instance.check(view, config.budget)
        with _collected(problems):
            config.pruner.instance.check_choices(view, config.importance, config.allocator)
        with _collected(problems):
            calibration_identity = calibration_data.identity(config.calibration, tokenizer)
            calibration = _calibration(config, tokenizer, limits)
    recovery = {key: value for key, value in config.recovery.identity().items() if key in NAMING}
    if config.pruner.instance.prunes:
        with _collected(problems):
            recovery |= config.recovery.instance.check(view, tokenizer, limits, device)
    evaluation = {}
    for name, evaluator in config.evaluation.items():
        with _collected(problems), under_its_key(name, evaluator.instance):
            code = {key: value for key, value in evaluator.identity().items() if key in NAMING}
            # What takes longer is tried only where nothing else is wrong.
            facts = evaluator.instance.check_settings() if problems else None
            evaluation[name] = code | (evaluator.instance.check(tokenizer, limits) if facts is None else facts)
    dtype = resolve_dtype(config.model.dtype, device, source)
    if config.save.model and config.pruner.instance.prunes:
        with _collected(problems):
            check_exportable(source, config, view)
    streaming = False
    with _collected(problems):
        streaming = streams(config, view, dtype, device, held)
    _refuse(problems)
    stored_dtype = config.save.dtype or source.stored_dtype
    notes = changed_by_tensors(source, trust_remote_code=trust)
    identity = identity_of(
        config,
        # Figures of before the head was taken as one of its own are another model's.
        model=source.fingerprint + ("#own_head" if notes else ""),
        dtype=str(dtype).removeprefix("torch."),
        calibration=calibration_identity,
        recovery=recovery,
        stored_dtype=stored_dtype,
        evaluation=evaluation,
    )
    return Prepared(
        config, source, tokenizer, limits, device, dtype, getattr(torch, stored_dtype), streaming, calibration,
        evaluation, identity, run_id_of(config, identity), notes,
    )  # fmt: skip


def streams(config: RunConfig, view: DecoderView, dtype: torch.dtype, device: torch.device, held: int = 0) -> bool:
    """Whether the weights stay on disk: as ``model.streaming`` says, or (auto) because they do not fit into memory.

    Raises:
        ConfigError: what the run asks for needs the whole model in memory.
    """
    needed = view.model_parameters * dtype.itemsize
    free = {str(device): available(device) + held}
    if device.type != "cpu":  # where the weights are read before they go to the device
        free["cpu"] = available(torch.device("cpu"))
    least = min(free, key=lambda name: free[name])
    fits = needed < _SHARE_OF_MEMORY * free[least]
    if config.model.streaming == "off" or (config.model.streaming == "auto" and fits):
        return False
    if config.model.streaming == "on":
        why = "model.streaming=on"
    else:
        why = (
            f"model.streaming=auto: the weights take {needed / 1e9:.1f} GB as {str(dtype).removeprefix('torch.')} and "
            f"{free[least] / 1e9:.1f} GB are free on {least}"
        )
    if view.mixtures:
        raise ConfigError(
            f"{why}: block {view.mixtures[0].index} is a mixture of experts, whose matrices lie in a checkpoint in "
            "another form than in memory, so it cannot be streamed; use model.streaming=off (model.dtype=bfloat16 "
            "halves the memory)"
        )
    pruner, importance = config.pruner.instance, config.importance.instance
    if pruner.prunes and "gradients" in required(importance) and "importance" in config.plans_with:
        raise ConfigError(
            f"{why}: gradients ({option_of('importance', importance)}) need the whole model in memory; use a "
            "metric of activations (importance=cfsp, wanda, flap), or model.streaming=off"
        )
    if pruner.prunes and pruner.needs_model_in_memory:
        raise ConfigError(f"{why}: pruner={pruner.name} needs the whole model in memory; use model.streaming=off")
    if pruner.prunes and config.recovery.instance.trains:
        raise ConfigError(
            f"{why}: recovery={config.recovery.instance.name} trains the model in memory; use recovery=none, or "
            "model.streaming=off"
        )
    allocator = config.allocator.instance
    if pruner.prunes and "allocator" in config.plans_with and allocator.needs_model:
        raise ConfigError(
            f"{why}: {option_of('allocator', allocator)} runs the model for each candidate, which would read "
            "it each time; use allocator=coarse or reconstruction, or model.streaming=off"
        )
    if isinstance(config.calibration, SelfCalibration) and pruner.prunes:
        raise ConfigError(
            f"{why}: calibration=self samples token by token, which would read the whole model for each; use "
            "calibration=bundled, text or tokens, or model.streaming=off"
        )
    return True


@contextmanager
def _collected(problems: list[CfspError]) -> Iterator[None]:
    """Note what is wrong with one input and go on to the next."""
    try:
        yield
    except CfspError as error:
        problems.append(error)
    except OSError as error:
        problems.append(DataError(f"an input cannot be read ({error}); see that it is there and readable"))


def _refuse(problems: list[CfspError]) -> None:
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigError(*(line for error in problems for line in error.problems))


def check_writable(key: str, folder: Path) -> None:
    """See that files can be written in ``folder``, which need not exist; leaves no trace.

    Raises:
        ConfigError: names the key and the folder.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{key}={folder}: cannot be written ({error.strerror}); give another folder") from error
    finally:
        for path in missing:
            # Another run may have put something there meanwhile.
            with suppress(OSError):
                path.rmdir()


def _calibration(config: RunConfig, tokenizer: Any, limits: Limits) -> CalibrationSet | None:
    section = config.calibration
    if isinstance(section, TextCalibration):
        return calibration_data.from_text(section, tokenizer, limits, config.seed)
    if isinstance(section, TokensCalibration):
        return calibration_data.from_tokens(section, limits, config.seed)
    assert isinstance(section, SelfCalibration)
    limits.check_length("calibration.seq_len", section.seq_len)
    return None
