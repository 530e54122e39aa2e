"""Distillation: the pruned model learns the dense model's distribution of the next token."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cfsp.recovery.checkpoints import read_seal, seal
from cfsp.recovery.data import IGNORED, Example
from cfsp.system.atomic import naming
from cfsp.system.progress import progress


class Teacher(Protocol):
    """Teacher that computes the distillation loss of a batch, summed over the learnt tokens."""

    def loss(self, student: Tensor, inputs: dict[str, Tensor], temperature: float) -> Tensor:
        """Return the loss of a batch against the teacher.

        Args:
            student: the student's logits of the batch, [B, T, V].
            inputs: batch as :func:`collate` returns it.
            temperature: softmax temperature of both distributions.
        """
        ...


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher || student), summed over rows and times temperature^2, computed in float32.

    Args:
        student: logits, [M, V].
        teacher: logits, [M, V].
        temperature: softmax temperature of both distributions.
    """
    log_p = (teacher.float() / temperature).log_softmax(-1)
    log_q = (student.float() / temperature).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum() * temperature**2


def kl_top_k(student: Tensor, values: Tensor, indices: Tensor, rest: Tensor, temperature: float) -> Tensor:
    """Return the sum of :func:`kl` where only the ``k`` largest logits of the teacher are known.

    All other tokens are treated as a single class.

    Args:
        student: logits, [M, V].
        values: the teacher's largest logits divided by the temperature, [M, k].
        indices: token ids of ``values``, [M, k].
        rest: logsumexp of the teacher's other logits divided by the temperature, [M].
        temperature: softmax temperature of both distributions.
    """
    log_p = torch.cat([values, rest[:, None]], 1).float().log_softmax(-1)
    scaled = student.float() / temperature
    top = scaled.gather(1, indices)
    log_rest = scaled.scatter(1, indices, float("-inf")).logsumexp(-1, keepdim=True)
    log_q = torch.cat([top, log_rest], 1).log_softmax(-1)
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p.isfinite(), terms, 0.0).sum() * temperature**2


class DenseInMemory:
    """Teacher that keeps the dense model in memory; weights that are not trained are shared with the pruned model."""

    def __init__(self, model: nn.Module, trained_ids: Collection[int]) -> None:
        """Copy the dense model's trained parameters, and share the other ones.

        Args:
            model: the model with the dense weights in place.
            trained_ids: ``id`` of each parameter that is trained.
        """
        tensors = (*model.parameters(), *model.buffers())
        self.model = copy.deepcopy(model, {id(t): t for t in tensors if id(t) not in trained_ids}).eval()
        for name, parameter in self.model.named_parameters():
            if id(model.get_parameter(name)) in trained_ids:
                parameter.requires_grad_(False)

    def loss(self, student: Tensor, inputs: dict[str, Tensor], temperature: float) -> Tensor:
        """See :meth:`Teacher.loss`."""
        with torch.no_grad():
            logits = self.model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            ).logits
        learnt = inputs["labels"][:, 1:] != IGNORED
        return kl(student[:, :-1][learnt], logits[:, :-1][learnt], temperature)


class TopKOnDisk:
    """Teacher that reads the dense model's ``k`` largest logits of every learnt token from memory-mapped files."""

    def __init__(self, folder: Path, examples: Sequence[Example]) -> None:
        """Open the files that :meth:`write` has written for the same examples."""
        self.values = np.load(folder / "values.npy", mmap_mode="r")
        self.indices = np.load(folder / "indices.npy", mmap_mode="r")
        self.rest = np.load(folder / "rest.npy", mmap_mode="r")
        self.starts = _first_rows(examples)

    @staticmethod
    @torch.no_grad()
    def write(
        model: nn.Module,
        examples: Sequence[Example],
        folder: Path,
        run_id: str,
        *,
        k: int,
        temperature: float,
        batch_size: int,
    ) -> None:
        """Compute and write the dense model's logits of the examples, unless this run has written them already.

        Args:
            model: the model with the dense weights in place.
            examples: training examples.
            folder: folder for the files.
            run_id: identifier of the run.
            k: number of logits that are kept for each learnt token.
            temperature: softmax temperature, by which the logits are divided.
            batch_size: examples in one forward pass.

        Raises:
            OSError: the disk is full; names the file.
        """
        starts = _first_rows(examples)
        if read_seal(folder, run_id) is not None:
            return
        shutil.rmtree(folder, ignore_errors=True)  # removes an old seal before files are written
        folder.mkdir(parents=True)
        total, vocabulary = int(starts[-1]), int(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
        k = min(k, vocabulary - 1)
        values, indices, rest = (
            _new_array(folder / "values.npy", "f4", (total, k)),
            _new_array(folder / "indices.npy", "i4", (total, k)),
            _new_array(folder / "rest.npy", "f4", (total,)),
        )
        device = next(model.parameters()).device
        for begin in progress(range(0, len(examples), batch_size), "dense model's logits", unit="batch"):
            batch = collate(range(begin, min(begin + batch_size, len(examples))), examples)
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            logits = model(
                input_ids=on_device["input_ids"], attention_mask=on_device["attention_mask"], use_cache=False
            ).logits
            learnt = on_device["labels"][:, 1:] != IGNORED
            scaled = logits[:, :-1][learnt].float() / temperature
            top = scaled.topk(k, dim=-1)
            log_rest = scaled.scatter(1, top.indices, float("-inf")).logsumexp(-1)
            at = slice(int(starts[begin]), int(starts[min(begin + batch_size, len(examples))]))
            values[at], indices[at] = top.values.cpu().numpy(), top.indices.cpu().numpy()
            rest[at] = log_rest.cpu().numpy()
        for array in (values, indices, rest):
            array.flush()
        seal(folder, {"run_id": run_id})

    def loss(self, student: Tensor, inputs: dict[str, Tensor], temperature: float) -> Tensor:
        """See :meth:`Teacher.loss`."""
        rows = np.concatenate([np.arange(self.starts[at], self.starts[at + 1]) for at in inputs["index"].tolist()])
        device = student.device
        values = torch.from_numpy(self.values[rows]).to(device)
        indices = torch.from_numpy(self.indices[rows]).to(device).long()
        rest = torch.from_numpy(self.rest[rows]).to(device)
        learnt = inputs["labels"][:, 1:] != IGNORED
        return kl_top_k(student[:, :-1][learnt], values, indices, rest, temperature)


def _new_array(file: Path, dtype: str, shape: tuple[int, ...]) -> np.memmap:
    """Create a memory-mapped .npy file, and allocate its space on the disk.

    Without the allocation, writing to the mapped file on a full disk would kill the process.

    Raises:
        OSError: the disk is full; names the file.
    """
    array = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
    with naming(file), file.open("r+b") as stream:
        if hasattr(os, "posix_fallocate"):  # Linux
            os.posix_fallocate(stream.fileno(), 0, os.fstat(stream.fileno()).st_size)
    return array


def _first_rows(examples: Sequence[Example]) -> np.ndarray:
    """Return the row at which each example's learnt tokens begin, and the total number of rows, [n + 1]."""
    counts = [sum(label != IGNORED for label in example.labels) for example in examples]
    return np.concatenate([[0], np.cumsum(counts)])


def collate(rows: Sequence[int], examples: Sequence[Example]) -> dict[str, Tensor]:
    """Build a batch, padded on the right to its longest example.

    Args:
        rows: indices of the batch's examples.
        examples: all examples.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each [B, T], and ``index``, the indices of the examples, [B].
    """
    length = max(len(examples[row].input_ids) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for at, row in enumerate(rows):
        n = len(examples[row].input_ids)
        ids[at, :n] = torch.tensor(examples[row].input_ids)
        labels[at, :n] = torch.tensor(examples[row].labels)
        mask[at, :n] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "index": torch.tensor(list(rows))}
