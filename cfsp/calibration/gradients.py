"""Gradient terms of the language-model loss, reduced to one number per row or column of each matrix (LLM-Pruner).

The backward pass goes block by block, so that full weight gradients exist for only one block at a time.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cfsp.architecture.experts import ExpertMatrices
from cfsp.architecture.ffn import FFN
from cfsp.architecture.projection import Projection
from cfsp.architecture.views import BlockView
from cfsp.errors import ConfigError, DataError, RunError
from cfsp.model.driver import BlockDriver, Entry, run_block
from cfsp.model.snapshot import without_hooks
from cfsp.system.cache import read_or_compute
from cfsp.system.memory import available
from cfsp.system.progress import progress

if TYPE_CHECKING:
    from cfsp.calibration.calibration_set import CalibrationSet
    from cfsp.calibration.statistics_cache import StatisticsCache

log = logging.getLogger(__name__)

#: Part of the cache key: raise it whenever what is collected, or how, changes.
GRADIENT_VERSION = 1
#: Share of the free memory for the values saved for the backward pass; the rest is for gradients and logits.
_SHARE_OF_MEMORY = 0.5
#: Names of the rows of every term.
VARIANTS = ("element1", "element2", "mix", "vector")


@dataclass(frozen=True)
class GradientTerms:
    """Gradient terms of every block, one number for each row or column of each matrix.

    With g the gradient of the mean loss over all sequences and F the mean of the squared per-sequence gradients
    (diagonal Fisher), and each sum over one row (column), as in LLM-Pruner's TaylorImportance
    (LLMPruner/pruner/hf_llama_pruner.py; arXiv 2305.11627, Eq. 3 to 5): element1 = sum |W g|, element2 = sum |W F W|,
    mix = sum |W g - W F W / 2|, vector = |sum W g|.

    Attributes:
        blocks: per block, projection (gate, up, down, q, k, v, o) -> [4, n] fp64 on CPU, a row per variant of
            ``VARIANTS``; n is the number of output rows of gate, up, q, k, v, and of input columns of down, o. In a
            mixture of experts gate, up and down are [4, E, n].
    """

    blocks: tuple[Mapping[str, Tensor], ...]

    def save(self, path: Path, metadata: Mapping[str, Any]) -> None:
        """Write one safetensors file."""
        from safetensors.torch import save_file

        tensors = {f"{i}.{name}": value for i, block in enumerate(self.blocks) for name, value in block.items()}
        save_file(tensors, path, metadata={"cfsp": json.dumps({**metadata, "blocks": len(self.blocks)})})

    @staticmethod
    def load(path: Path) -> GradientTerms:
        """Read a file that :meth:`save` wrote."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as stream:
            blocks: list[dict[str, Tensor]] = [{} for _ in range(json.loads(stream.metadata()["cfsp"])["blocks"])]
            for name in stream.keys():  # noqa: SIM118
                block, _, projection = name.partition(".")
                blocks[int(block)][projection] = stream.get_tensor(name)
        return GradientTerms(tuple(blocks))


def gradient_terms(
    driver: BlockDriver,
    calibration: CalibrationSet,
    cache: StatisticsCache | None = None,
    *,
    checkpointing: bool = False,
) -> tuple[GradientTerms, bool]:
    """Compute the gradient terms of every block, or read them from the cache.

    Sequences run one at a time, because F needs per-sequence gradients. The model, its ``requires_grad`` and ``grad``
    are restored.

    Args:
        checkpointing: keep only the hidden states that enter each block and run the block again in the backward pass,
            instead of keeping all values that backward needs; the same result in less memory and more time. False:
            only where these values do not fit into the free memory.

    Returns:
        The terms, and whether they were read.

    Raises:
        ConfigError: some weights are not in memory.
        DataError: windows of one token, which leave nothing to predict.
        RunError: a gradient is not finite; the message names the block.
    """
    _check_in_memory(driver.view.model)
    if calibration.input_ids.shape[1] < 2:
        # The mean over no tokens is NaN, but its gradient is 0: all scores would silently be equal.
        raise DataError(
            f"{calibration.name}: windows of one token have no next token to predict; gradients need at least 2, "
            "or use a metric without gradients, e.g. importance=wanda"
        )
    version = GRADIENT_VERSION + (1000 if driver.view.mixtures else 0)
    path = None if cache is None else cache.path("gradients", driver, calibration, version, batched=False)
    header = {"name": calibration.name, "version": version}
    return read_or_compute(
        path,
        GradientTerms.load,
        lambda: _compute(BlockDriver(driver.view, 1), calibration.input_ids, checkpointing),
        lambda terms, file: terms.save(file, header),
    )


def _check_in_memory(model: nn.Module) -> None:
    offloaded = any(getattr(getattr(m, "_hf_hook", None), "offload", False) for m in model.modules())
    if offloaded or any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError(
            f"{type(model).__name__}: gradients need every weight in memory, and some are streamed or offloaded; load "
            "the model whole (e.g. model.dtype=bfloat16), or use a metric without gradients, e.g. importance=wanda"
        )


@torch.enable_grad()
def _compute(driver: BlockDriver, input_ids: Tensor, checkpointing: bool) -> GradientTerms:
    view = driver.view
    entry = driver.entry(input_ids)
    if not checkpointing and not _fits(driver, entry):
        log.info("gradients: the values that backward needs do not fit into memory, so each block is run twice")
        checkpointing = True
    terms_of_blocks: list[dict[str, Tensor]] = [{} for _ in view.blocks]
    with _weights_require_grad(list(view.blocks)):
        inputs: list[list[Tensor]] = []
        outputs: list[list[Tensor]] = []
        hidden: Sequence[Tensor] = entry.hidden
        for block in progress(view.blocks, "forward for gradients", unit="block"):
            leaves = [state.detach().requires_grad_() for state in hidden]
            with torch.set_grad_enabled(not checkpointing):
                block_outputs = [
                    run_block(block, x, kw) for x, kw in zip(leaves, entry.kwargs[block.index], strict=True)
                ]
            # Hidden states of other sequences wait in CPU memory, which is larger.
            inputs.append([leaf.detach().cpu() for leaf in leaves] if checkpointing else leaves)
            outputs.append([] if checkpointing else block_outputs)
            hidden = [state.detach() for state in block_outputs]
        grads = [_loss_gradient(driver, ids, state) for ids, state in zip(entry.ids, hidden, strict=True)]
        for block in progress(view.blocks[::-1], "backward", unit="block"):
            kwargs = entry.kwargs[block.index]
            terms = _Terms(block)
            for number, leaf in enumerate(inputs[block.index]):
                if checkpointing:
                    leaf = leaf.to(view.device).requires_grad_()
                    output = run_block(block, leaf, kwargs[number])
                else:
                    output = outputs[block.index][number]
                grads[number], *weights = torch.autograd.grad(
                    output, [leaf, *terms.matrices()], grads[number], allow_unused=True
                )
                terms.add(weights)
            terms_of_blocks[block.index] = terms.report()
            inputs[block.index], outputs[block.index] = [], []
    return GradientTerms(tuple(terms_of_blocks))


def _fits(driver: BlockDriver, entry: Entry) -> bool:
    """Return whether the values saved for the backward pass of all blocks fit into the free memory.

    They are measured on one sequence in one block, the widest one; parameters are not counted.
    """
    view = driver.view
    block = max(view.blocks, key=lambda each: sum(weight.numel() for weight in each.module.parameters()))
    parameters = {weight.untyped_storage().data_ptr() for weight in block.module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    sequence = entry.hidden[0].detach().requires_grad_()
    quiet = without_hooks([*block.module.modules()])  # Hooks of the user must not be called in this trial pass.
    with quiet, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run_block(block, sequence, entry.kwargs[block.index][0])
    del output
    needed = sum(kept.values()) * len(entry.hidden) * len(view.blocks)
    return needed < _SHARE_OF_MEMORY * available(view.device)


def _loss_gradient(driver: BlockDriver, ids: Tensor, hidden: Tensor) -> Tensor:
    """Return the gradient of one sequence's mean next-token loss with respect to the last hidden states."""
    leaf = hidden.detach().requires_grad_()
    logits = driver.logits(ids, leaf)
    loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    return torch.autograd.grad(loss, leaf)[0]


class _Terms:
    """Mean and mean square over the sequences of the gradients of one block's matrices, fp32."""

    def __init__(self, block: BlockView) -> None:
        self.block = block
        self.projections = projections(block)
        self.n = 0
        self.sums = [
            torch.zeros_like(projection.weight, dtype=torch.float32) for projection in self.projections.values()
        ]
        self.squares = [torch.zeros_like(value) for value in self.sums]

    def matrices(self) -> list[Tensor]:
        return [projection.parameter for projection in self.projections.values()]

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add the gradients of one sequence; None for an expert that did not run."""
        self.n += 1
        rows = zip(self.projections.values(), self.sums, self.squares, gradients, strict=True)
        for projection, total, squares, stored in rows:
            if stored is None:
                continue
            gradient = projection.part(stored).float()
            total += gradient
            squares += gradient.square()

    def report(self) -> dict[str, Tensor]:
        report = {}
        for (name, projection), total, squares in zip(self.projections.items(), self.sums, self.squares, strict=True):
            axis = -2 if name.startswith("down") or name == "o" else -1
            weight = projection.weight.detach().float()
            first, second = weight * (total / self.n), weight * (squares / self.n) * weight
            terms = [
                first.abs().sum(axis, dtype=torch.float64),
                second.abs().sum(axis, dtype=torch.float64),
                (first - 0.5 * second).abs().sum(axis, dtype=torch.float64),
                first.sum(axis, dtype=torch.float64).abs(),
            ]
            report[name] = torch.stack(terms).cpu()
            if not report[name].isfinite().all():
                raise RunError(
                    f"block {self.block.index}: the gradients of {name} are not finite; try model.dtype=float32"
                )
        return _experts_together(report)


def _experts_together(terms_by_name: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack the terms of experts that are modules as those of fused ones: "gate.0", "gate.1", ... -> gate [4, E, n]."""
    together = {name: values for name, values in terms_by_name.items() if "." not in name}
    for kind in dict.fromkeys(name.partition(".")[0] for name in terms_by_name if "." in name):
        n = sum(name.startswith(f"{kind}.") for name in terms_by_name)
        together[kind] = torch.stack([terms_by_name[f"{kind}.{expert}"] for expert in range(n)], dim=1)
    return together


def projections(block: BlockView) -> dict[str, Projection | ExpertMatrices]:
    """Return the matrices of a block that make its coupled groups, by the names of :class:`GradientTerms`.

    For experts that are modules, the name ends with the expert's number, as in "gate.3".
    """
    matrices: dict[str, Projection | ExpertMatrices] = {}
    if isinstance(block.ffn, FFN):
        matrices |= block.ffn.projections
    elif block.ffn is not None:
        matrices |= block.ffn.fused
        for expert, expert_ffn in enumerate(block.ffn.each):
            matrices |= {f"{name}.{expert}": projection for name, projection in expert_ffn.projections.items()}
    return matrices if block.attention is None else {**matrices, **block.attention.projections}


@contextmanager
def _weights_require_grad(blocks: list[BlockView]) -> Iterator[None]:
    """Make every matrix differentiable inside ``with``, even frozen ones, and restore ``requires_grad`` afterwards."""
    weights = list({projection.parameter: None for block in blocks for projection in projections(block).values()})
    before = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight, was in zip(weights, before, strict=True):
            weight.requires_grad_(was)
