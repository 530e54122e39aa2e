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
from cfsp.recovery.checkpoints import last_whole, seal_checkpoint
from cfsp.recovery.data import IGNORED, Example
from cfsp.recovery.distill import Teacher, collate
from cfsp.recovery.settings import Training
from cfsp.system import processes
from cfsp.system.atomic import naming
from cfsp.system.progress import Work

log = logging.getLogger(__name__)


class RecoveryTrainer(Trainer):
    """Mean loss over the learnt tokens of a whole optimiser step, however it is split into micro-batches."""

    settings: Training
    teacher: Teacher | None
    run_id: str
    #: Steps of the training as progress lines count them; None: no lines are written.
    work: Work | None = None
    #: Of this process since it started; of all of them before.
    tokens, tokens_before = 0, 0
    started, seconds_before = 0.0, 0.0

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if sharded() and not self.is_fsdp_enabled:
            # accelerate shards on accelerators alone; torch does on CPUs too.
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # torch.save says of a full disk neither what it is nor which file it was writing.
        with naming(Path(str(self.args.output_dir))):
            super()._save_checkpoint(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
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
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.tokens += int(inputs["attention_mask"].sum())
        if processes.total(int(not torch.isfinite(loss))):
            raise self._not_finite("the loss is not finite", self.state.global_step + 1)
        return loss

    def check_weights(self) -> None:
        """Refuse to go on where a trained weight is not finite.

        Raises:
            RunError: says at which step.
        """
        model: Any = self.model
        trained = (p for p in model.parameters() if p.requires_grad)
        if processes.total(sum(int(not torch.isfinite(local(p)).all()) for p in trained)):
            raise self._not_finite("a weight is not finite", self.state.global_step)

    def _not_finite(self, quantity: str, step: int) -> RunError:
        checkpoint = last_whole(Path(str(self.args.output_dir)), self.run_id) if processes.launched().first else None
        kept = "" if checkpoint is None else f"; the last good checkpoint is kept in {checkpoint[0]}"
        return RunError(
            f"recovery: {quantity} at step {step}{kept}; give another paths.output_dir and try a smaller "
            "recovery.learning_rate, more recovery.warmup_steps, model.dtype=float32 or recovery.bf16=false"
        )

    def restore(self, sealed: dict[str, Any]) -> None:
        """Go on counting where the checkpoint stopped."""
        self.tokens_before, self.seconds_before = int(sealed["tokens"]), float(sealed["seconds"])

    def all_tokens(self) -> int:
        """Tokens that went through the model, in all processes and before a resumption."""
        return self.tokens_before + processes.total(self.tokens)

    def seconds(self) -> float:
        """Return the seconds spent on training, before a resumption too."""
        return self.seconds_before + time.perf_counter() - self.started

    def gather_into(self, model: nn.Module) -> None:
        """Put the sharded weights together in the first process's ``model``, which is whole."""
        full = self.accelerator.get_state_dict(self.model_wrapped)
        if processes.launched().first:
            lacking = [name for name, p in model.named_parameters() if p.requires_grad and name not in full]
            if lacking:
                raise RunError(f"recovery: {lacking[0]} was lost while the shards were put together")
            model.load_state_dict(full, strict=False)

    def history(self) -> list[dict[str, Any]]:
        """Return the mean loss of every ``log_every`` steps, and the learning rate of the last of them.

        The last mean is of the steps left. Trainer's own log has every step, so a resumption does not change a mean.
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


class _Watch(TrainerCallback):
    """A callback that seals whole checkpoints, and logs loss, tokens per second and the time left."""

    def __init__(self, trainer: RecoveryTrainer, context: RecoveryContext) -> None:
        self.trainer, self.context = trainer, context
        self.first_step = 0
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        from tqdm import tqdm

        self.trainer.started, self.first_step = time.perf_counter(), state.global_step
        state.save_steps = args.save_steps  # a resumption takes the checkpoint's otherwise
        for row in self.trainer.history():  # a logger that started anew gets what came before
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
            control.should_save = False  # the trained weights themselves are kept

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        due = state.global_step % self.trainer.settings.log_every == 0 or state.global_step == state.max_steps
        if not logs or "loss" not in logs or not due:
            return
        row = self.trainer.history()[-1]
        seconds = time.perf_counter() - self.trainer.started
        pace = processes.total(self.trainer.tokens) / max(seconds, 1e-9)
        remaining = time_left(state.global_step - self.first_step, state.max_steps - self.first_step, seconds)
        self.bar.set_postfix_str(f"loss {row['loss']:.3f}, {pace:,.0f} tokens/s")
        log.info(
            "recover: step %d of %d, loss %.4f, %s tokens/s, %s left",
            state.global_step, state.max_steps, row["loss"], f"{pace:,.0f}", remaining,
        )  # fmt: skip
        self._report({**row, "tokens_per_second": pace})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        tokens = self.trainer.all_tokens()
        self.trainer.check_weights()
        if processes.launched().first:  # the others have written what they have: the sums above waited for them
            sealed = {"step": state.global_step, "tokens": tokens, "seconds": self.trainer.seconds()}
            sealed |= {"run_id": self.context.run_id, "sharded": sharded()}
            seal_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}", sealed)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()
        self.trainer.check_weights()

    def _report(self, row: dict[str, Any]) -> None:
        shown = ("step", "loss", "learning_rate", "tokens_per_second")
        self.context.report({f"recovery/{key}": row[key] for key in shown if key in row})


def sharded() -> bool:
    """Tell whether the launcher asks for FSDP (``accelerate launch --use_fsdp``)."""
    return processes.launched().several and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def local(parameter: Tensor) -> Tensor:
    """Return the part of a parameter that is in this process."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()


def time_left(done: int, total: int, seconds: float) -> str:
    """Format the time left at the pace so far: ``1:23`` minutes or ``2:03:04`` hours."""
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
    """Return a trainer over ``examples``, which are handed out by number so that a teacher on disk finds its rows."""
    trainer = RecoveryTrainer(
        model=model,
        args=arguments,
        train_dataset=range(len(examples)),
        data_collator=lambda rows: collate(rows, examples),
    )
    trainer.settings, trainer.teacher, trainer.run_id = settings, teacher, context.run_id
    trainer.model_accepts_loss_kwargs = True  # compute_loss divides by the tokens of the whole step itself
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Watch(trainer, context))
    return trainer
