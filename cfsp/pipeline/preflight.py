"""Cheap checks before a run: model folder, structure, budget, data and tasks. No weight is loaded."""

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
from cfsp.config.sections import samples_the_model
from cfsp.data.limits import Limits
from cfsp.errors import CfspError, ConfigError, DataError
from cfsp.evaluation.base import name_key_in_errors
from cfsp.export.check import check_exportable
from cfsp.importance.base import required_items
from cfsp.model.device import resolve_device, resolve_dtype
from cfsp.model.outline import config_corrections, outline
from cfsp.model.tokenizer import load_tokenizer
from cfsp.plan.check import read_block_sizes
from cfsp.plan.history import check_history
from cfsp.pruned_model.adopt import check_adoptable
from cfsp.record.out_folder import check_outside
from cfsp.system.memory import available
from cfsp.system.package import package_path
from cfsp.weights.source import ModelSource, locate

#: Share of the free memory that the weights may take. The rest is for the activations of a pass.
_SHARE_OF_MEMORY = 0.8


@dataclass(frozen=True)
class Prepared:
    """The checked inputs of a run.

    Attributes:
        config: the checked configuration.
        source: the model folder.
        tokenizer: the model's tokenizer.
        limits: size of the vocabulary and longest window of the model.
        device: where the model computes.
        dtype: dtype of the weights in memory.
        stored_dtype: dtype of the weights in the saved folder.
        streaming: whether the weights stay on disk.
        calibration: the calibration set; None where it is sampled from the model, or not needed.
        evaluation: name of each evaluator -> the facts that identify its inputs.
        identity: everything that decides the figures of the run.
        run_id: hash of ``identity``.
        notes: sentences for the record, on weights that contradict config.json or were dequantised.
    """

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
    notes: tuple[str, ...] = ()

    @property
    def progress(self) -> Path:
        """Folder from which a killed run resumes: plan, figures, training. It does not depend on OUT."""
        return Path(self.config.paths.cache_dir) / "progress" / self.run_id


@dataclass(frozen=True)
class _Inputs:
    """Inputs of the checks.

    Attributes:
        config: the configuration.
        source: the model folder.
        view: view of the model, built without memory for its weights.
        tokenizer: the model's tokenizer.
        limits: size of the vocabulary and longest window of the model.
        device: where the model will compute.
    """

    config: RunConfig
    source: ModelSource
    view: DecoderView
    tokenizer: Any
    limits: Limits
    device: torch.device


def prepare(config: RunConfig, *, reclaimable_bytes: int = 0) -> Prepared:
    """Locate and check every input of a run.

    Args:
        config: the checked configuration.
        reclaimable_bytes: memory of a base model that an earlier run left in the pool; it is freed for this run.

    Raises:
        CfspError: an input is wrong; the message names the key and the way out. Inputs that do not depend on each other
            are all checked before one is refused.
    """
    device, source = _locate(config)
    trust = config.model.trust_remote_code
    view = outline(source, trust_remote_code=trust)
    limits = Limits(view.model.get_input_embeddings().weight.shape[0], source.positions)
    tokenizer = load_tokenizer(source, trust_remote_code=trust)
    inputs = _Inputs(config, source, view, tokenizer, limits, device)
    problems: list[CfspError] = []
    calibration, calibration_identity = _check_method(inputs, problems)
    recovery = _check_recovery(inputs, problems)
    evaluation = _check_evaluation(inputs, problems)
    dtype = resolve_dtype(config.model.dtype, device, source)
    if config.save.model and config.pruner.instance.prunes:
        with _collect_problems(problems):
            check_exportable(source, config, view)
    streaming = False
    with _collect_problems(problems):
        streaming = must_stream(config, view, dtype, device, reclaimable_bytes)
    _raise_problems(problems)
    stored_dtype = config.save.dtype or source.stored_dtype
    changes = config_corrections(source, trust_remote_code=trust)
    origin = source.dequantised
    notes = changes if origin is None else (f"{source.name}: {origin.sentence}", *origin.notes, *changes)
    identity = identity_of(
        config,
        # A model whose LM head differs from what config.json says gets an identity of its own: figures from before
        # cfsp read such heads belong to another model.
        model=source.fingerprint + ("#own_head" if changes else ""),
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


def _locate(config: RunConfig) -> tuple[torch.device, ModelSource]:
    """Return the device and the model folder; check that the folders of the run can be written."""
    problems: list[CfspError] = []
    device = source = None
    folders = {f"paths.{key}": Path(getattr(config.paths, key)) for key in ("cache_dir", "records_dir")}
    model = package_path(str(config.model.path))
    if model.is_dir():  # before locate(), which writes into the cache
        for key, folder in folders.items():
            with _collect_problems(problems):
                check_outside(key, folder, model)
        _raise_problems(problems)
    with _collect_problems(problems):
        device = resolve_device(config.model.device)
    with _collect_problems(problems):
        source = locate(config.model, Path(config.paths.cache_dir))
    for key, folder in folders.items():
        with _collect_problems(problems):
            check_writable(key, folder)
    _raise_problems(problems)
    assert device is not None
    assert source is not None
    return device, source


def _check_method(inputs: _Inputs, problems: list[CfspError]) -> tuple[CalibrationSet | None, dict[str, Any] | None]:
    """Check the pruner, its metric and allocator, and the calibration set.

    Returns:
        The calibration set and its identity; None for each if the run does not prune or a check failed.
    """
    config, view = inputs.config, inputs.view
    calibration, identity = None, None
    if not config.pruner.instance.prunes:
        return calibration, identity
    with _collect_problems(problems):
        check_history(inputs.source.folder, read_block_sizes(view))
    with _collect_problems(problems):
        check_adoptable(view.model)
    with _collect_problems(problems):
        config.pruner.instance.check(view, config.budget)
    with _collect_problems(problems):
        config.pruner.instance.check_choices(view, config.importance, config.allocator)
    with _collect_problems(problems):
        identity = calibration_data.identity(config.calibration, inputs.tokenizer)
        calibration = calibration_data.load_windows(config.calibration, inputs.tokenizer, inputs.limits, config.seed)
    return calibration, identity


def _check_recovery(inputs: _Inputs, problems: list[CfspError]) -> dict[str, Any]:
    """Check the recovery; return the facts that identify it and its data."""
    recovery = inputs.config.recovery
    identity = {key: value for key, value in recovery.identity().items() if key in NAMING}
    if inputs.config.pruner.instance.prunes:
        with _collect_problems(problems):
            identity |= recovery.instance.check(inputs.view, inputs.tokenizer, inputs.limits, inputs.device)
    return identity


def _check_evaluation(inputs: _Inputs, problems: list[CfspError]) -> dict[str, dict[str, Any]]:
    """Check every evaluator; return its name -> the facts that identify its code and inputs."""
    evaluation = {}
    for name, evaluator in inputs.config.evaluation.items():
        with _collect_problems(problems), name_key_in_errors(name, evaluator.instance):
            code = {key: value for key, value in evaluator.identity().items() if key in NAMING}
            # Checks that take long run only if no other input is wrong.
            facts = evaluator.instance.check_settings() if problems else None
            evaluation[name] = code | (
                evaluator.instance.check(inputs.tokenizer, inputs.limits) if facts is None else facts
            )
    return evaluation


def must_stream(
    config: RunConfig, view: DecoderView, dtype: torch.dtype, device: torch.device, reclaimable_bytes: int = 0
) -> bool:
    """Return whether the weights must stay on disk: by ``model.streaming``, or (auto) because they do not fit.

    Args:
        config: the configuration.
        view: view of the model, without weights.
        dtype: dtype of the weights in memory.
        device: where the model will compute.
        reclaimable_bytes: memory of a base model that an earlier run left in the pool; it is freed for this run.

    Raises:
        ConfigError: the weights must stay on disk, but the run needs the whole model in memory.
    """
    needed = view.model_parameters * dtype.itemsize
    free = {str(device): available(device) + reclaimable_bytes}
    if device.type != "cpu":  # the weights are read into host memory before they go to the device
        free["cpu"] = available(torch.device("cpu"))
    tightest = min(free, key=lambda name: free[name])
    fits = needed < _SHARE_OF_MEMORY * free[tightest]
    if config.model.streaming == "off" or (config.model.streaming == "auto" and fits):
        return False
    if config.model.streaming == "on":
        why = "model.streaming=on"
    else:
        why = (
            f"model.streaming=auto: the weights take {needed / 1e9:.1f} GB as {str(dtype).removeprefix('torch.')} and "
            f"{free[tightest] / 1e9:.1f} GB are free on {tightest}"
        )
    pruner, importance = config.pruner.instance, config.importance.instance
    if pruner.prunes and "gradients" in required_items(importance) and "importance" in config.plans_with:
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
    if samples_the_model(config.calibration) and pruner.prunes:
        raise ConfigError(
            f"{why}: calibration=self samples token by token, which would read the whole model for each; use "
            "calibration=bundled, text or tokens, or model.streaming=off"
        )
    return True


@contextmanager
def _collect_problems(problems: list[CfspError]) -> Iterator[None]:
    """Add an error raised inside the context to ``problems``, so that the next input is checked too."""
    try:
        yield
    except CfspError as error:
        problems.append(error)
    except OSError as error:
        problems.append(DataError(f"an input cannot be read ({error}); see that it is there and readable"))


def _raise_problems(problems: list[CfspError]) -> None:
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigError(*(line for error in problems for line in error.problems))


def check_writable(key: str, folder: Path) -> None:
    """Check that files can be written in ``folder``, which need not exist; leave nothing behind.

    Raises:
        ConfigError: the folder cannot be written; the message names the key and the folder.
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
            # Another run may have written a file there in the meantime.
            with suppress(OSError):
                path.rmdir()
