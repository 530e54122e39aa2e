"""Training on Hugging Face's Trainer: checks before it starts, its inputs, and its record."""

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
from cfsp.recovery.checkpoints import last_whole, load_trained, save_trained
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
    """Check data, settings and hardware.

    Returns:
        Data by content, and every setting that decides the result.

    Raises:
        CfspError: names the key and the way out.
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
        lacks = "the package bitsandbytes" if on_cuda else f"a CUDA device (this run's is {device})"
        raise ConfigError(f"recovery.optimizer=adamw_8bit: needs {lacks}; use recovery.optimizer=adamw")
    if settings.bf16 and on_cuda and not is_bf16_supported():
        raise ConfigError("recovery.bf16=true: this GPU has no bfloat16; use recovery.bf16=false")
    if settings.bf16 and device.type not in ("cuda", "cpu"):
        raise ConfigError(f"recovery.bf16=true: not supported on {device}; use recovery.bf16=false")
    return _deciding(settings) | {"data": _data(settings, tokenizer, limits)}


def _data(settings: Training, tokenizer: Any, limits: Limits) -> dict[str, Any]:
    """Return the facts of the data that decide the result: contents, not places or names."""
    data = settings.data
    decides: dict[str, Any] = {"kind": data.kind, "n_samples": data.n_samples}
    if data.kind == "self":
        _check_warmup(settings, data.n_samples or 0)
        # How many are sampled at a time decides which random numbers each gets.
        return decides | {"temperature": data.sampling_temperature, "batch_size": data.sampling_batch_size}
    if data.kind == "text":
        decides |= {"text_field": data.text_field, "txt_rows": data.txt_rows, "join": data.join}
    examples = read_examples(settings, tokenizer, limits)
    _check_warmup(settings, len(examples))
    file = recovery_data.locate(data).identity
    return decides | {"sha256": file["sha256"], "format": file["format"], "examples": len(examples)}


def _check_warmup(settings: Training, examples: int) -> None:
    """Refuse a training that ends before its learning rate is reached (with max_steps the settings do)."""
    if settings.epochs is None:
        return
    steps = math.ceil(settings.epochs * examples / settings.batch_size)
    if settings.warmup_steps >= steps:
        raise ConfigError(
            f"recovery.warmup_steps={settings.warmup_steps}: {settings.epochs:g} epochs of {examples} examples are "
            f"about {steps} steps of recovery.batch_size={settings.batch_size}, so the learning rate would never be "
            "reached; use fewer warm-up steps"
        )


def _take_over(
    model: nn.Module, trained: nn.Module, trainer: RecoveryTrainer, narrow: list[tuple[nn.Parameter, torch.dtype]]
) -> None:
    """Bring the trained weights into ``model``, in eval mode and without what the training put around them.

    Args:
        model: the model that the run goes on with.
        trained: the model that was trained; with FSDP a copy of ``model``, else ``model`` itself.
        trainer: the trainer.
        narrow: parameters that were widened for the training, with their own dtypes.
    """
    # accelerate puts autocast around the model's own forward; what is evaluated is what is saved.
    trainer.accelerator.unwrap_model(trained, keep_fp32_wrapper=False)
    if trainer.settings.gradient_checkpointing:
        _recompute_activations(trained, False)
    if trained is not model:
        trainer.gather_into(model)
    else:
        for parameter, dtype in narrow:
            parameter.data = parameter.data.to(dtype)
    model.eval()


def _sha256(settings: Training) -> str | None:
    data = settings.data
    return None if data.kind == "self" else recovery_data.locate(data).identity["sha256"]


def _deciding(settings: Training) -> dict[str, Any]:
    """Return the settings that decide the result, without those that this data and objective do not use."""
    unread = {key for key, _ in settings.unread()}
    return {name: value for name, value in deciding_settings(settings).items() if name not in unread}


def read_examples(settings: Training, tokenizer: Any, limits: Limits) -> list[Example]:
    """Read the examples of a file.

    Raises:
        DataError: rows of another form, nothing to learn, or ids that the model does not have.
    """
    file = recovery_data.locate(settings.data)
    read = recovery_data.instructions if settings.data.kind == "instructions" else recovery_data.windows
    examples = read(file, settings, tokenizer)
    recovery_data.check_ids(examples, limits)
    return examples


def _checkpoint_to_resume(context: RecoveryContext) -> tuple[Path, dict[str, Any]] | None:
    """Return the last whole checkpoint of this training and its seal; None where it begins anew.

    Raises:
        RunError: the checkpoint was written with FSDP and this run is without it, or the other way round.
    """
    # Start-up time: loads accelerate, torch, transformers.
    from cfsp.recovery.trainer import sharded

    resumed = processes.from_first(lambda: last_whole(context.folder, context.run_id))
    if resumed is not None and resumed[1]["sharded"] != sharded():
        how = "with FSDP (accelerate launch --use_fsdp)" if resumed[1]["sharded"] else "without FSDP"
        raise RunError(
            f"{resumed[0]}: was written {how}, and can be gone on from so only; launch cfsp in the same way, or remove "
            f"{context.folder} to begin again"
        )
    return resumed


def train(model: nn.Module, settings: Training, context: RecoveryContext) -> dict[str, Any]:
    """Train the parameters that require a gradient; a killed run goes on from its checkpoints in ``context.folder``.

    Returns:
        Facts for the record: steps, tokens, seconds, trainable parameters, history of loss and learning rate.

    Raises:
        RunError: the loss is not finite; says at which step, and the last whole checkpoint stays.
    """
    import torch

    # Start-up time: loads accelerate, torch, transformers.
    from cfsp.recovery.trainer import make_trainer, sharded

    done = processes.from_first(lambda: load_trained(model, context.folder, context.run_id))
    if done is not None:
        log.info("recovery: %d steps were done before", done["steps"])
        return done
    examples = processes.from_first(lambda: _examples(settings, context))
    teacher = _teacher(settings, context, examples, trained=model is context.model)
    context.folder.mkdir(parents=True, exist_ok=True)
    resumed = _checkpoint_to_resume(context)
    parks = settings.objective == "lm" or settings.teacher == "disk"
    # Not the launcher's: what decides the result is in the configuration.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if settings.bf16 else "no"
    count = processes.launched().count
    arguments = _arguments(settings, context, count, next(model.parameters()).device)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # FSDP takes a model apart for good.
    trained: Any = copy.deepcopy(model) if sharded() else model
    if settings.gradient_checkpointing:
        _recompute_activations(trained, True)
    narrow = _widen(trained)
    with torch.random.fork_rng(), context.parked() if parks else nullcontext():
        trainer = make_trainer(trained, arguments, examples, settings, teacher, context)
        if resumed is not None:
            path, sealed = resumed
            log.info("recovery: going on from %s", path.name)
            trainer.restore(sealed)
        with working("recover", None, "step") as trainer.work:
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed[0]))
    _take_over(model, trained, trainer, narrow)
    record = {
        "objective": settings.objective,
        "data": settings.data.name,
        "data_sha256": _sha256(settings),
        "examples": len(examples),
        "steps": trainer.state.global_step,
        "tokens": trainer.all_tokens(),
        "seconds": trainer.seconds(),
        "processes": count,
        "parallel": None if count == 1 else "fsdp" if sharded() else "ddp",
        "trainable_parameters": trainable,
        "history": trainer.history(),
    }
    if processes.launched().first:
        save_trained(model, context.folder, context.run_id, record)
    return record


def _arguments(
    settings: Training, context: RecoveryContext, n_processes: int, device: torch.device
) -> TrainingArguments:
    """Return the arguments of Trainer for a training by so many processes, each on its ``device``."""
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
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel would split a model that is on one device here
    return arguments


def _widen(model: nn.Module) -> list[tuple[nn.Parameter, torch.dtype]]:
    """Train parameters of 16 bits in float32, because most updates would be rounded away.

    Returns:
        The parameters with their earlier dtypes.
    """
    import torch

    narrow = [
        (p, p.dtype) for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)
    ]
    for parameter, _ in narrow:
        parameter.data = parameter.data.float()
    return narrow


def _recompute_activations(model: Any, on: bool) -> None:
    # transformers calls it activation checkpointing since 5.20, and gradient checkpointing before
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if not on:
        getattr(model, f"{word}_checkpointing_disable")()
        return
    getattr(model, f"{word}_checkpointing_enable")(**{f"{word}_checkpointing_kwargs": {"use_reentrant": False}})
    model.enable_input_require_grads()


def _examples(settings: Training, context: RecoveryContext) -> Sequence[Example]:
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
    return recovery_data.of_windows(windows.input_ids.tolist())


def _teacher(settings: Training, context: RecoveryContext, examples: Sequence[Example], *, trained: bool) -> Any:
    """Return the teacher of a distillation; None for other objectives.

    Args:
        trained: whether the model's own weights change, so that the dense model needs a copy of the shared ones.
    """
    if settings.objective == "lm":
        return None
    # Start-up time: loads torch.
    from cfsp.recovery.distill import DenseInMemory, TopKOnDisk

    changes = {id(p) for p in context.model.parameters()} if trained else set()
    with context.dense():
        if settings.teacher == "memory":
            return DenseInMemory(context.model, changes)
        folder = context.folder / "teacher"
        sizes = {"k": settings.top_k, "batch_size": settings.micro_batch_size}
        temperature = settings.distill_temperature
        processes.from_first(
            lambda: TopKOnDisk.write(context.model, examples, folder, context.run_id, temperature=temperature, **sizes)
        )
        return TopKOnDisk(folder, examples)
