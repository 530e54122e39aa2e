"""Settings common to all recoveries that train: data, objective, batch, schedule and checkpoints.

This module has no heavy imports, because parsing a configuration loads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, cast

from pydantic import Field, model_validator

from cfsp.config.components import component, shown
from cfsp.config.deciding import Decides

Positive = Annotated[int, Field(ge=1, strict=True)]
#: Name that is part of file names.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$"), Decides("name")]


@component
class HubFile:
    """One file of a dataset repository on the hub (json, jsonl or parquet).

    Attributes:
        repo: name of the repository, e.g. "yahma/alpaca-cleaned".
        file: path of the file in the repository.
        revision: branch, tag or commit; None: the default branch.
    """

    repo: str
    file: str
    revision: str | None = None


@component
class RecoveryData:
    """Training data of a recovery.

    Attributes:
        kind: "instructions": rows with instruction, input and output, or with prompt and response. "text": a text that
            is cut into windows of ``cutoff`` tokens. "self": ``n_samples`` windows sampled from the dense model.
        name: name of the data in records and tables.
        path: local file.
        hub: file on the hub.
        text_field: field of a row that holds the text, for files of rows.
        txt_rows: how a .txt file is divided into rows.
        join: string between the rows of a text.
        n_samples: number of rows or windows to use; None: all of them.
        sampling_temperature: softmax temperature at which windows are sampled from the dense model.
        sampling_batch_size: number of windows that are sampled at a time.
    """

    kind: Literal["instructions", "text", "self"]
    name: Annotated[str, Decides("name")]
    path: Annotated[str | None, Decides("content")] = None
    hub: Annotated[HubFile | None, Decides("content")] = None
    text_field: str = "text"
    txt_rows: Literal["whole", "lines", "wikitext"] = "whole"
    join: str = "\n\n"
    n_samples: Positive | None = None
    sampling_temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    sampling_batch_size: Positive = 32

    @model_validator(mode="after")
    def _complete(self) -> RecoveryData:
        if self.kind == "self" and self.n_samples is None:
            raise ValueError(
                "recovery.data.n_samples=null: data sampled from the dense model needs a number of windows"
            )
        if self.kind == "self" and (self.path is not None or self.hub is not None):
            raise ValueError(
                f"recovery.data.path={self.path}: recovery/data={self.name} is sampled from the dense model and reads "
                "no file; leave it out, or use recovery/data=text or instructions"
            )
        if self.kind != "self" and self.path is None and self.hub is None:
            raise ValueError(
                f"recovery.data.path=null: recovery/data={self.name} needs a file, e.g. recovery.data.path=FILE.jsonl"
            )
        return self


@component
class Training:
    """Settings of every recovery that trains.

    Exactly one of ``epochs`` and ``max_steps`` is set.

    Attributes:
        data: training data.
        objective: "lm": cross-entropy of the next token. "distill": distillation from the dense model.
        distill_temperature: softmax temperature of teacher and student.
        distill_weight: weight of the distillation loss; the cross-entropy has the rest, up to a sum of 1.
        teacher: "memory": the dense model stays in memory. "disk": its largest logits are written to disk beforehand.
        top_k: number of logits for each token that a teacher on disk keeps.
        learning_rate: highest learning rate of the schedule.
        schedule: learning rate after the warm-up.
        warmup_steps: optimiser steps with a rising learning rate.
        weight_decay: weight decay of AdamW.
        max_grad_norm: norm to which gradients are clipped.
        batch_size: sequences in one optimiser step.
        micro_batch_size: sequences in one forward pass of a process.
        epochs: passes over the data.
        max_steps: number of optimiser steps.
        cutoff: largest number of tokens of a sequence; the rest is cut off.
        packing: whether several short examples share a sequence.
        response_only: whether only the tokens of responses are learnt.
        optimizer: optimiser; "adamw_8bit" needs CUDA and bitsandbytes.
        bf16: whether the model computes in bfloat16 under autocast.
        gradient_checkpointing: whether activations are recomputed in the backward pass, to save memory.
        checkpoint_every: optimiser steps between two checkpoints.
        log_every: optimiser steps between two log lines.
    """

    data: RecoveryData
    objective: Literal["lm", "distill"] = "lm"
    distill_temperature: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    distill_weight: float = Field(default=1.0, gt=0, le=1)
    teacher: Literal["memory", "disk"] = "memory"
    top_k: Positive = 64
    learning_rate: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    max_grad_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    batch_size: Positive = 64
    micro_batch_size: Positive = 8
    epochs: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_steps: Positive | None = None
    cutoff: int = Field(default=256, ge=2)
    packing: bool = False
    response_only: bool = True
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    bf16: bool = False
    gradient_checkpointing: bool = False
    checkpoint_every: Annotated[Positive, Decides("nothing")] = 200
    log_every: Annotated[Positive, Decides("nothing")] = 10

    @model_validator(mode="after")
    def _consistent(self) -> Any:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError(
                f"recovery.epochs={self.epochs} recovery.max_steps={self.max_steps}: give exactly one, the other null"
            )
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            raise ValueError(
                f"recovery.warmup_steps={self.warmup_steps}: recovery.max_steps={self.max_steps} steps end before the "
                "learning rate is reached; use fewer warm-up steps"
            )
        fields = cast(Any, type(self)).__dataclass_fields__
        for key, reason in self.unused_keys():
            if getattr(self, key) != getattr(fields[key].default, "default", fields[key].default):
                raise ValueError(f"recovery.{key}={shown(getattr(self, key))}: {reason}; leave it out")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"recovery.batch_size={self.batch_size}: must be a multiple of "
                f"recovery.micro_batch_size={self.micro_batch_size}"
            )
        return self

    def memory_advice(self) -> str:
        """See :class:`cfsp.config.contracts.Recovery`."""
        teacher_on_disk = ", recovery.teacher=disk" if self.objective == "distill" else ""
        return (
            "lower recovery.micro_batch_size (batch_size stays what it is) or recovery.cutoff, or use "
            f"recovery.gradient_checkpointing=true{teacher_on_disk} or model.dtype=bfloat16"
        )

    def unused_keys(self) -> Iterator[tuple[str, str]]:
        """Yield each key that this objective or kind of data does not use, with the reason for the error message.

        Such keys have to keep their defaults.
        """
        if self.objective == "lm":
            for key in ("teacher", "top_k", "distill_temperature", "distill_weight"):
                yield key, "is used only with recovery.objective=distill, and the objective is lm"
        elif self.teacher == "memory":
            yield "top_k", "is used only with recovery.teacher=disk"
        if self.data.kind != "instructions":
            yield "packing", f"is for instructions; recovery/data={self.data.name} is cut into full windows already"
            yield "response_only", f"recovery/data={self.data.name} has no responses, every token is learnt"
