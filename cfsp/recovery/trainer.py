"""Hugging Face's Trainer with cfsp's objective, checkpoints and log lines."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from cfsp.errors import RunError
from cfsp.recovery.base import RecoveryContext
from cfsp.recovery.checkpoints import find_last_checkpoint, seal_checkpoint
from cfsp.recovery.data import IGNORED, Example
from cfsp.recovery.distill import Teacher, collate
from cfsp.recovery.settings import Training
from cfsp.system import processes
from cfsp.system.atomic import naming
from cfsp.system.progress import Work

log = logging.getLogger(__name__)


class RecoveryTrainer(Trainer):
    """Trainer whose loss is the mean over the learnt tokens of an optimiser step, independent of the micro-batch size.

    Attributes:
        settings: settings of the training.
        teacher: teacher of a distillation; None: there is none.
        run_id: identifier of the run.
        work: counter of steps for progress lines; None: no lines are written.
        tokens: tokens that this process has trained on since it started.
        tokens_before: tokens of all processes before the training was resumed.
        started: start of this process's training, in seconds of ``time.perf_counter``.
        seconds_before: seconds of training before it was resumed.
    """

    settings: Training
    teacher: Teacher | None
    run_id: str
    work: Work | None = None
    tokens, tokens_before = 0, 0
    started, seconds_before = 0.0, 0.0

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, with FSDP also on CPUs."""
        super().create_accelerator_and_postprocess()
        if uses_fsdp() and not self.is_fsdp_enabled:
            # accelerate enables FSDP only on accelerators, although torch supports it on CPUs.
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # On a full disk, torch.save names neither the cause nor the file.
        with naming(Path(str(self.args.output_dir))):
            super()._save_checkpoint(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a micro-batch, divided by the learnt tokens of the whole optimiser step."""
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
        labels = inputs["labels"][:, 1:]
        weight = self.settings.distill_weight if self.teacher is not None else 0.0
        loss = logits.new_zeros((), dtype=torch.float32)
        if weight < 1:
            flat = logits[:, :-1].flatten(0, 1).float()
            loss = (1 - weight) * functional.cross_entropy(
                flat, labels.flatten(), ignore_index=IGNORED, reduction="sum"
            )
        if self.teacher is not None:
            loss = loss + weight * self.teacher.loss(logits, inputs, self.settings.distill_temperature)
        count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss = loss / count
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages the gradients
        return (loss, logits) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Train on one micro-batch, and count its tokens.

        Raises:
            RunError: the loss is not finite; names the step.
        """
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.tokens += int(inputs["attention_mask"].sum())
        if processes.total(int(not torch.isfinite(loss))):
            raise self._not_finite("the loss is not finite", self.state.global_step + 1)
        return loss

    def check_weights(self) -> None:
        """Check that all trained weights are finite.

        Raises:
            RunError: a weight is not finite; names the step.
        """
        model: Any = self.model
        trained = (p for p in model.parameters() if p.requires_grad)
        if processes.total(sum(int(not torch.isfinite(local_shard(p)).all()) for p in trained)):
            raise self._not_finite("a weight is not finite", self.state.global_step)

    def _not_finite(self, quantity: str, step: int) -> RunError:
        checkpoint = (
            find_last_checkpoint(Path(str(self.args.output_dir)), self.run_id) if processes.launched().first else None
        )
        kept = "" if checkpoint is None else f"; the last good checkpoint is kept in {checkpoint[0]}"
        return RunError(
            f"recovery: {quantity} at step {step}{kept}; give another paths.output_dir and try a smaller "
            "recovery.learning_rate, more recovery.warmup_steps, model.dtype=float32 or recovery.bf16=false"
        )

    def restore_counters(self, seal: dict[str, Any]) -> None:
        """Continue counting tokens and seconds from the values in a checkpoint's seal."""
        self.tokens_before, self.seconds_before = int(seal["tokens"]), float(seal["seconds"])

    def total_tokens(self) -> int:
        """Return the number of tokens trained on, over all processes and including those before a resumption."""
        return self.tokens_before + processes.total(self.tokens)

    def total_seconds(self) -> float:
        """Return the seconds spent on training, including those before a resumption."""
        return self.seconds_before + time.perf_counter() - self.started

    def gather_weights_into(self, model: nn.Module) -> None:
        """Gather the sharded weights of all processes into the unsharded ``model`` of the first process.

        Raises:
            RunError: a trained weight is missing from the gathered ones.
        """
        weights = self.accelerator.get_state_dict(self.model_wrapped)
        if processes.launched().first:
            missing = [name for name, p in model.named_parameters() if p.requires_grad and name not in weights]
            if missing:
                raise RunError(f"recovery: {missing[0]} was lost while the shards were put together")
            model.load_state_dict(weights, strict=False)

    def history(self) -> list[dict[str, Any]]:
        """Return the training curve: for every ``log_every`` steps the mean loss and the last learning rate.

        The last row is the mean of the remaining steps. Trainer's own log has every step, so that a resumption does not
        change a mean.
        """
        rows = [row for row in self.state.log_history if "loss" in row]
        groups: dict[int, list[dict[str, Any]]] = {}
        for row in rows:
            groups.setdefault((int(row["step"]) - 1) // self.settings.log_every, []).append(row)
        return [
            {
                "step": group[-1]["step"],
                "loss": sum(row["loss"] for row in group) / len(group),
                **{key: group[-1][key] for key in ("learning_rate", "grad_norm") if key in group[-1]},
            }
            for group in groups.values()
        ]


class _ProgressCallback(TrainerCallback):
    """Callback that seals complete checkpoints, and logs loss, tokens per second and the time left."""

    def __init__(self, trainer: RecoveryTrainer, context: RecoveryContext) -> None:
        self.trainer, self.context = trainer, context
        self.first_step = 0
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        from tqdm import tqdm

        self.trainer.started, self.first_step = time.perf_counter(), state.global_step
        state.save_steps = args.save_steps  # otherwise a resumption uses the value in the checkpoint
        for row in self.trainer.history():  # the logger of a resumed run has not seen these rows
            self._report(row)
        if self.trainer.work is not None:
            self.trainer.work.total = state.max_steps - state.global_step
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="recover", unit="step", leave=False,
            disable=not sys.stderr.isatty() or not processes.launched().first,
        )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(1)
        if self.trainer.work is not None:
            self.trainer.work.advance()
        if state.global_step >= state.max_steps:
            control.should_save = False  # save_trained keeps the final weights

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        due = state.global_step % self.trainer.settings.log_every == 0 or state.global_step == state.max_steps
        if not logs or "loss" not in logs or not due:
            return
        row = self.trainer.history()[-1]
        seconds = time.perf_counter() - self.trainer.started
        tokens_per_second = processes.total(self.trainer.tokens) / max(seconds, 1e-9)
        remaining = format_time_left(state.global_step - self.first_step, state.max_steps - self.first_step, seconds)
        self.bar.set_postfix_str(f"loss {row['loss']:.3f}, {tokens_per_second:,.0f} tokens/s")
        log.info(
            "recover: step %d of %d, loss %.4f, %s tokens/s, %s left",
            state.global_step, state.max_steps, row["loss"], f"{tokens_per_second:,.0f}", remaining,
        )  # fmt: skip
        self._report({**row, "tokens_per_second": tokens_per_second})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Both calls sum over all processes and so wait until each has written its files of the checkpoint.
        tokens = self.trainer.total_tokens()
        self.trainer.check_weights()
        if processes.launched().first:
            seal = {"step": state.global_step, "tokens": tokens, "seconds": self.trainer.total_seconds()}
            seal |= {"run_id": self.context.run_id, "sharded": uses_fsdp()}
            seal_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}", seal)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()
        self.trainer.check_weights()

    def _report(self, row: dict[str, Any]) -> None:
        keys = ("step", "loss", "learning_rate", "tokens_per_second")
        self.context.report({f"recovery/{key}": row[key] for key in keys if key in row})


def uses_fsdp() -> bool:
    """Return whether the launcher asks for FSDP (``accelerate launch --use_fsdp``)."""
    return processes.launched().several and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def local_shard(parameter: Tensor) -> Tensor:
    """Return the shard of a parameter that is in this process; the whole parameter without FSDP."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()


def format_time_left(done: int, total: int, seconds: float) -> str:
    """Format the time left at the present speed as ``1:23`` (minutes) or ``2:03:04`` (hours).

    Args:
        done: steps done in this process.
        total: steps to do in this process.
        seconds: seconds spent on the steps done.
    """
    remaining = math.ceil(seconds / max(done, 1) * (total - done))
    hours, rest = divmod(remaining, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def make_trainer(
    model: nn.Module,
    arguments: TrainingArguments,
    examples: Sequence[Example],
    settings: Training,
    teacher: Teacher | None,
    context: RecoveryContext,
) -> RecoveryTrainer:
    """Return a trainer on ``examples``.

    Its dataset holds the indices of the examples, because a teacher on disk needs them to find its rows.
    """
    trainer = RecoveryTrainer(
        model=model,
        args=arguments,
        train_dataset=range(len(examples)),
        data_collator=lambda rows: collate(rows, examples),
    )
    trainer.settings, trainer.teacher, trainer.run_id = settings, teacher, context.run_id
    trainer.model_accepts_loss_kwargs = True  # compute_loss divides by the tokens of the whole step itself
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_ProgressCallback(trainer, context))
    return trainer
