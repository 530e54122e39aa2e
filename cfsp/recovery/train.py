"""Training with Hugging Face's Trainer: checks before the run, inputs, and facts for the record."""

from __future__ import annotations

import copy
import importlib.util
import logging
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from cfsp.config.deciding import deciding_settings
from cfsp.config.sections import SelfCalibration
from cfsp.data.limits import Limits
from cfsp.errors import ConfigError, RunError
from cfsp.recovery import data as recovery_data
from cfsp.recovery.checkpoints import find_last_checkpoint, load_trained, save_trained
from cfsp.recovery.data import Example
from cfsp.recovery.settings import Training
from cfsp.system import processes
from cfsp.system.progress import working

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn
    from transformers import TrainingArguments

    from cfsp.recovery.base import RecoveryContext
    from cfsp.recovery.trainer import RecoveryTrainer

log = logging.getLogger(__name__)


def check_training(settings: Training, tokenizer: Any, limits: Limits, device: torch.device) -> dict[str, Any]:
    """Check data, settings and hardware before the run.

    Returns:
        Every setting that decides the result, with the data by content. They become part of the run identity.

    Raises:
        CfspError: the data, a setting or the hardware does not fit; names the key and the way out.
    """
    from torch.cuda import is_bf16_supported

    count = processes.launched().count
    if settings.batch_size % (settings.micro_batch_size * count):
        raise ConfigError(
            f"recovery.batch_size={settings.batch_size}: {count} processes with "
            f"recovery.micro_batch_size={settings.micro_batch_size} each need a multiple of "
            f"{settings.micro_batch_size * count}; change one of the two"
        )
    if count == 1 and device.index:
        raise ConfigError(
            f"model.device={device}: a recovery trains on the first device that it sees; use "
            f"CUDA_VISIBLE_DEVICES={device.index} and model.device={device.type}"
        )
    limits.check_length("recovery.cutoff", settings.cutoff)
    on_cuda = device.type == "cuda"
    if settings.optimizer == "adamw_8bit" and not (on_cuda and importlib.util.find_spec("bitsandbytes")):
        missing = "the package bitsandbytes" if on_cuda else f"a CUDA device (this run's is {device})"
        raise ConfigError(f"recovery.optimizer=adamw_8bit: needs {missing}; use recovery.optimizer=adamw")
    if settings.bf16 and on_cuda and not is_bf16_supported():
        raise ConfigError("recovery.bf16=true: this GPU has no bfloat16; use recovery.bf16=false")
    if settings.bf16 and device.type not in ("cuda", "cpu"):
        raise ConfigError(f"recovery.bf16=true: not supported on {device}; use recovery.bf16=false")
    return _deciding_settings(settings) | {"data": _data_identity(settings, tokenizer, limits)}


def _data_identity(settings: Training, tokenizer: Any, limits: Limits) -> dict[str, Any]:
    """Return the facts of the data that decide the result, which are contents and not paths or names."""
    data = settings.data
    identity: dict[str, Any] = {"kind": data.kind, "n_samples": data.n_samples}
    if data.kind == "self":
        _check_warmup(settings, data.n_samples or 0)
        # The batch size decides which random numbers each window gets.
        return identity | {"temperature": data.sampling_temperature, "batch_size": data.sampling_batch_size}
    if data.kind == "text":
        identity |= {"text_field": data.text_field, "txt_rows": data.txt_rows, "join": data.join}
    examples = read_examples(settings, tokenizer, limits)
    _check_warmup(settings, len(examples))
    file_identity = recovery_data.locate_file(data).identity
    return identity | {"sha256": file_identity["sha256"], "format": file_identity["format"], "examples": len(examples)}


def _check_warmup(settings: Training, examples: int) -> None:
    """Check that the training reaches its learning rate.

    With ``max_steps`` the settings check this themselves.

    Raises:
        ConfigError: there are at least as many warm-up steps as optimiser steps.
    """
    if settings.epochs is None:
        return
    steps = math.ceil(settings.epochs * examples / settings.batch_size)
    if settings.warmup_steps >= steps:
        raise ConfigError(
            f"recovery.warmup_steps={settings.warmup_steps}: {settings.epochs:g} epochs of {examples} examples are "
            f"about {steps} steps of recovery.batch_size={settings.batch_size}, so the learning rate would never be "
            "reached; use fewer warm-up steps"
        )


def _finish_training(
    model: nn.Module, trained: nn.Module, trainer: RecoveryTrainer, widened: list[tuple[nn.Parameter, torch.dtype]]
) -> None:
    """Put the trained weights into ``model`` in their own dtypes, undo changes of the training, and set eval mode.

    Args:
        model: the model with which the run continues.
        trained: the model that was trained; with FSDP a copy of ``model``, otherwise ``model`` itself.
        trainer: the trainer.
        widened: parameters that were converted to float32 for the training, with their own dtypes.
    """
    # accelerate wraps the model's forward in autocast. It is removed so that evaluation computes as the saved model.
    trainer.accelerator.unwrap_model(trained, keep_fp32_wrapper=False)
    if trainer.settings.gradient_checkpointing:
        _set_gradient_checkpointing(trained, False)
    if trained is not model:
        trainer.gather_weights_into(model)
    else:
        for parameter, dtype in widened:
            parameter.data = parameter.data.to(dtype)
    model.eval()


def _data_sha256(settings: Training) -> str | None:
    data = settings.data
    return None if data.kind == "self" else recovery_data.locate_file(data).identity["sha256"]


def _deciding_settings(settings: Training) -> dict[str, Any]:
    """Return the settings that decide the result, without those that this data or objective does not use."""
    unused = {key for key, _ in settings.unused_keys()}
    return {name: value for name, value in deciding_settings(settings).items() if name not in unused}


def read_examples(settings: Training, tokenizer: Any, limits: Limits) -> list[Example]:
    """Read the training examples of a file.

    Raises:
        DataError: a row has other keys, there is nothing to learn, or a token id is not in the model's vocabulary.
    """
    file = recovery_data.locate_file(settings.data)
    read = recovery_data.read_instructions if settings.data.kind == "instructions" else recovery_data.read_windows
    examples = read(file, settings, tokenizer)
    recovery_data.check_ids(examples, limits)
    return examples


def _find_resumable_checkpoint(context: RecoveryContext) -> tuple[Path, dict[str, Any]] | None:
    """Return the last complete checkpoint of this training and its seal; None if there is none.

    Raises:
        RunError: the checkpoint was written with FSDP and this run does not use it, or the other way round.
    """
    # Start-up time: loads accelerate, torch, transformers.
    from cfsp.recovery.trainer import uses_fsdp

    checkpoint = processes.from_first(lambda: find_last_checkpoint(context.folder, context.run_id))
    if checkpoint is not None and checkpoint[1]["sharded"] != uses_fsdp():
        mode = "with FSDP (accelerate launch --use_fsdp)" if checkpoint[1]["sharded"] else "without FSDP"
        raise RunError(
            f"{checkpoint[0]}: was written {mode}, and the training can only be continued in the same way; launch cfsp "
            f"so, or remove {context.folder} to begin again"
        )
    return checkpoint


def train(model: nn.Module, settings: Training, context: RecoveryContext) -> dict[str, Any]:
    """Train the parameters that require a gradient.

    A killed run continues from its last checkpoint in ``context.folder``.

    Args:
        model: model to train, changed in place.
        settings: settings of the training.
        context: context of the recovery.

    Returns:
        Facts for the record: steps, tokens, seconds, trainable parameters, and the history of loss and learning rate.

    Raises:
        RunError: the loss or a weight is not finite; names the step. The last complete checkpoint is kept.
    """
    import torch

    # Start-up time: loads accelerate, torch, transformers.
    from cfsp.recovery.trainer import make_trainer, uses_fsdp

    finished = processes.from_first(lambda: load_trained(model, context.folder, context.run_id))
    if finished is not None:
        log.info("recovery: %d steps were done before", finished["steps"])
        return finished
    examples = processes.from_first(lambda: _load_examples(settings, context))
    teacher = _build_teacher(settings, context, examples, trained=model is context.model)
    context.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = _find_resumable_checkpoint(context)
    # The dense model's own weights are not needed, so they need not take accelerator memory.
    park_dense = settings.objective == "lm" or settings.teacher == "disk"
    # Overrides the launcher's setting, because only the configuration may decide the result.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if settings.bf16 else "no"
    count = processes.launched().count
    arguments = _training_arguments(settings, context, count, next(model.parameters()).device)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # FSDP shards a model irreversibly, so a copy is trained.
    trained: Any = copy.deepcopy(model) if uses_fsdp() else model
    if settings.gradient_checkpointing:
        _set_gradient_checkpointing(trained, True)
    widened = _widen_parameters(trained)
    with torch.random.fork_rng(), context.parked() if park_dense else nullcontext():
        trainer = make_trainer(trained, arguments, examples, settings, teacher, context)
        if checkpoint is not None:
            path, seal = checkpoint
            log.info("recovery: going on from %s", path.name)
            trainer.restore_counters(seal)
        with working("recover", None, "step") as trainer.work:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint[0]))
    _finish_training(model, trained, trainer, widened)
    record = {
        "objective": settings.objective,
        "data": settings.data.name,
        "data_sha256": _data_sha256(settings),
        "examples": len(examples),
        "steps": trainer.state.global_step,
        "tokens": trainer.total_tokens(),
        "seconds": trainer.total_seconds(),
        "processes": count,
        "parallel": None if count == 1 else "fsdp" if uses_fsdp() else "ddp",
        "trainable_parameters": trainable,
        "history": trainer.history(),
    }
    if processes.launched().first:
        save_trained(model, context.folder, context.run_id, record)
    return record


def _training_arguments(
    settings: Training, context: RecoveryContext, n_processes: int, device: torch.device
) -> TrainingArguments:
    """Return Trainer's arguments for a training by ``n_processes`` processes, each on its own ``device``."""
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(context.folder),
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.batch_size // (settings.micro_batch_size * n_processes),
        num_train_epochs=settings.epochs or 1.0,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule if settings.schedule != "constant" else "constant_with_warmup",
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch" if settings.optimizer == "adamw" else "adamw_bnb_8bit",
        bf16=settings.bf16,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.checkpoint_every,
        disable_tqdm=True,
        report_to="none",
        seed=context.seed % 2**32,
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # otherwise Trainer would wrap the model in DataParallel
    return arguments


def _widen_parameters(model: nn.Module) -> list[tuple[nn.Parameter, torch.dtype]]:
    """Convert trained 16-bit parameters to float32, since most updates would be rounded away in 16 bits.

    Returns:
        The converted parameters with their own dtypes.
    """
    import torch

    parameters = [
        (p, p.dtype) for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)
    ]
    for parameter, _ in parameters:
        parameter.data = parameter.data.float()
    return parameters


def _set_gradient_checkpointing(model: Any, on: bool) -> None:
    # transformers calls it activation checkpointing since 5.20, and gradient checkpointing before.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if not on:
        getattr(model, f"{kind}_checkpointing_disable")()
        return
    getattr(model, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
    model.enable_input_require_grads()


def _load_examples(settings: Training, context: RecoveryContext) -> Sequence[Example]:
    """Read the examples of a file, or sample them from the dense model."""
    if settings.data.kind != "self":
        return read_examples(settings, context.tokenizer, context.limits)
    # Start-up time: loads torch.
    from cfsp.calibration.self_generated import load_or_sample_windows

    data = settings.data
    assert data.n_samples is not None
    section = SelfCalibration(
        kind="self", name=data.name, n_samples=data.n_samples, seq_len=settings.cutoff,
        sampling_temperature=data.sampling_temperature, batch_size=data.sampling_batch_size,
    )  # fmt: skip
    with context.dense():
        windows = load_or_sample_windows(
            context.model, context.tokenizer, section, context.limits, context.seed, context.cache, context.fingerprint
        )
    return recovery_data.label_windows(windows.input_ids.tolist())


def _build_teacher(settings: Training, context: RecoveryContext, examples: Sequence[Example], *, trained: bool) -> Any:
    """Return the teacher of a distillation; None for other objectives.

    Args:
        settings: settings of the training.
        context: context of the recovery.
        examples: training examples.
        trained: whether the model's own weights are trained, so that the dense model needs a copy of the shared ones.
    """
    if settings.objective == "lm":
        return None
    # Start-up time: loads torch.
    from cfsp.recovery.distill import DenseInMemory, TopKOnDisk

    trained_ids = {id(p) for p in context.model.parameters()} if trained else set()
    with context.dense():
        if settings.teacher == "memory":
            return DenseInMemory(context.model, trained_ids)
        folder = context.folder / "teacher"
        sizes = {"k": settings.top_k, "batch_size": settings.micro_batch_size}
        temperature = settings.distill_temperature
        processes.from_first(
            lambda: TopKOnDisk.write(context.model, examples, folder, context.run_id, temperature=temperature, **sizes)
        )
        return TopKOnDisk(folder, examples)
