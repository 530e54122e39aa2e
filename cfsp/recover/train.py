"""The training loop: Hugging Face Trainer, with checkpoints that count only when they are whole, and resumption."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cfsp.config import SelfCalibration
from cfsp.data import recovery as recovery_data
from cfsp.data.calibration import Limits
from cfsp.data.recovery import Example
from cfsp.errors import ConfigError
from cfsp.recover.settings import EXECUTION, Training

if TYPE_CHECKING:
    from torch import nn

    from cfsp.recover.base import RecoveryContext

log = logging.getLogger(__name__)

#: Written into a checkpoint when it is whole; a checkpoint without it was cut off and is not resumed from.
MARKER = "cfsp_complete.json"


def check_training(settings: Training, tokenizer: Any, limits: Limits, device: str) -> dict[str, Any]:
    """Data by content, every setting that decides the result; hardware that is asked for must be there.

    Raises:
        CfspError: names the key and the way out.
    """
    from dataclasses import asdict

    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: training in several processes is not supported yet; start cfsp "
            "without accelerate launch or torchrun"
        )
    limits.check_length("recovery.cutoff", settings.cutoff)
    if settings.optimizer == "adamw_8bit" and (device != "cuda" or importlib.util.find_spec("bitsandbytes") is None):
        lacks = "the package bitsandbytes" if device == "cuda" else f"a CUDA device (this run's is {device})"
        raise ConfigError(f"recovery.optimizer=adamw_8bit: needs {lacks}; use recovery.optimizer=adamw")
    if settings.bf16 and device == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("recovery.bf16=true: this GPU has no bfloat16; use recovery.bf16=false")
    if settings.bf16 and device not in ("cuda", "cpu"):
        raise ConfigError(f"recovery.bf16=true: not supported on {device}; use recovery.bf16=false")
    data = asdict(cast(Any, settings.data))
    for location in ("path", "hub", "sampling_batch_size"):
        data.pop(location)
    if settings.data.kind == "self":
        return {"data": data | {"sampling_batch_size": settings.data.sampling_batch_size}} | _deciding(settings)
    file = recovery_data.locate(settings.data)
    examples = read_examples(settings, tokenizer, limits)
    return {"data": data | {"sha256": file.identity["sha256"], "examples": len(examples)}} | _deciding(settings)


def _deciding(settings: Training) -> dict[str, Any]:
    from dataclasses import asdict

    return {name: value for name, value in asdict(cast(Any, settings)).items() if name not in EXECUTION}


def read_examples(settings: Training, tokenizer: Any, limits: Limits) -> list[Example]:
    """The examples of a file.

    Raises:
        DataError: rows of another form, nothing to learn, or ids that the model does not have.
    """
    file = recovery_data.locate(settings.data)
    read = recovery_data.instructions if settings.data.kind == "instructions" else recovery_data.windows
    examples = read(file, settings, tokenizer)
    recovery_data.check_ids(examples, limits)
    return examples


def train(model: nn.Module, settings: Training, context: RecoveryContext) -> dict[str, Any]:
    """Train what requires a gradient; resumes from the last whole checkpoint in ``context.folder``.

    Returns:
        For the record: steps, tokens, seconds, trainable parameters, history of loss and learning rate.

    Raises:
        RunError: the loss is not finite; says at which step, and the last whole checkpoint stays.
    """
    import torch
    from transformers import TrainingArguments

    from cfsp.recover.trainer import make_trainer

    examples = _examples(settings, context)
    teacher = _teacher(settings, context, examples, trained=model is context.model)
    context.folder.mkdir(parents=True, exist_ok=True)
    resumed = last_whole(context.folder, context.run_id)
    device = next(model.parameters()).device
    arguments = TrainingArguments(
        output_dir=str(context.folder),
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.batch_size // settings.micro_batch_size,
        num_train_epochs=settings.epochs or 1.0,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule if settings.schedule != "constant" else "constant_with_warmup",
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch" if settings.optimizer == "adamw" else "adamw_bnb_8bit",
        bf16=settings.bf16,
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.checkpoint_every,
        disable_tqdm=True,
        report_to="none",
        seed=context.seed % 2**32,
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel would split what is on one device here
    if settings.gradient_checkpointing:
        inner: Any = model
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        inner.enable_input_require_grads()
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    start = time.perf_counter()
    with torch.random.fork_rng():
        trainer = make_trainer(model, arguments, examples, settings, teacher, context)
        if resumed is not None:
            log.info("recovery: going on from %s", resumed.name)
            trainer.restore(json.loads((resumed / MARKER).read_text(encoding="utf-8")))
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    if settings.gradient_checkpointing:
        inner.gradient_checkpointing_disable()
    model.eval()
    return {
        "objective": settings.objective,
        "data": settings.data.name,
        "examples": len(examples),
        "steps": trainer.state.global_step,
        "tokens": trainer.tokens,
        "seconds": time.perf_counter() - start,
        "trainable_parameters": trainable,
        "history": trainer.history(),
    }


def last_whole(folder: Path, run_id: str) -> Path | None:
    """The newest whole checkpoint of this run; what was cut off, or is another run's, is removed."""
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        try:
            marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
            if marker["run_id"] != run_id:
                raise ValueError(marker["run_id"])
            found[int(marker["step"])] = path
        except (OSError, ValueError, KeyError):
            shutil.rmtree(path)
    return found[max(found)] if found else None


def mark_whole(path: Path, content: dict[str, Any]) -> None:
    """Say that ``path`` is whole; only then are older checkpoints removed."""
    partial = path / f".{MARKER}"
    partial.write_text(json.dumps(content), encoding="utf-8")
    os.replace(partial, path / MARKER)
    for other in path.parent.glob("checkpoint-*"):
        if other != path:
            shutil.rmtree(other)


def _examples(settings: Training, context: RecoveryContext) -> Sequence[Example]:
    if settings.data.kind != "self":
        return read_examples(settings, context.tokenizer, context.limits)
    from cfsp.data.self_generated import sampled

    data = settings.data
    assert data.n_samples is not None
    section = SelfCalibration(
        kind="self", name=data.name, n_samples=data.n_samples, seq_len=settings.cutoff,
        sampling_temperature=data.sampling_temperature, batch_size=data.sampling_batch_size,
    )  # fmt: skip
    with context.dense():
        windows = sampled(
            context.model, context.tokenizer, section, context.limits, context.seed, context.cache, context.fingerprint
        )
    return recovery_data.of_windows(windows.input_ids.tolist())


def _teacher(settings: Training, context: RecoveryContext, examples: Sequence[Example], *, trained: bool) -> Any:
    """``trained``: the model's own weights change, so that the dense model needs a copy of what they share."""
    if settings.objective == "lm":
        return None
    from cfsp.recover.distill import DenseInMemory, TopKOnDisk

    with context.dense():
        if settings.teacher == "memory":
            return DenseInMemory(context.model, shares=not trained)
        return TopKOnDisk.write(
            context.model,
            examples,
            context.folder / f"teacher-{context.run_id}",
            k=settings.top_k,
            temperature=settings.distill_temperature,
            batch_size=settings.micro_batch_size,
        )


def time_left(done: int, total: int, seconds: float) -> str:
    """``1:23`` minutes or ``2:03:04`` hours at the pace so far."""
    left = math.ceil(seconds / max(done, 1) * (total - done))
    hours, rest = divmod(left, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def watched() -> bool:
    """Whether a person looks at the progress bar."""
    return sys.stderr.isatty()
