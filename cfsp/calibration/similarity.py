"""Similarity of the hidden states between any two blocks, for depth pruning; one pass, cached on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cfsp.model.block_calls import input_hidden, output_hidden
from cfsp.model.driver import BlockDriver
from cfsp.system.cache import read_or_compute

if TYPE_CHECKING:
    from cfsp.calibration.calibration_set import CalibrationSet
    from cfsp.calibration.statistics_cache import StatisticsCache

#: Part of the cache key: raise it whenever the collected values or their computation change.
SIMILARITY_VERSION = 1


@dataclass(frozen=True)
class BlockSimilarity:
    """Cosine similarity of the hidden states h_i and h_j, [L+1, L+1] fp64; h_i enters block i, h_L leaves the model.

    Attributes:
        mean: over all tokens.
        last: over the last tokens of the sequences.
    """

    mean: Tensor
    last: Tensor


def block_similarity(
    driver: BlockDriver, calibration: CalibrationSet, cache: StatisticsCache | None = None
) -> tuple[BlockSimilarity, bool]:
    """Compute the similarities in one pass over the set, or read them from the cache.

    The pass holds the hidden states of one batch. Cosines are taken in fp32 and summed per sequence in fp64.

    Returns:
        The similarities, and whether they were read.
    """
    from safetensors.torch import load_file, save_file

    path = None if cache is None else cache.path("similarity", driver, calibration, SIMILARITY_VERSION)
    return read_or_compute(
        path,
        lambda file: BlockSimilarity(**load_file(file)),
        lambda: _compute(driver, calibration.input_ids),
        lambda similarity, file: save_file(vars(similarity), file),
    )


def _compute(driver: BlockDriver, input_ids: Tensor) -> BlockSimilarity:
    blocks = driver.view.blocks
    states: list[Tensor] = []
    sums = torch.zeros(2, len(blocks) + 1, len(blocks) + 1, dtype=torch.float64)

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(input_hidden(args, kwargs))

    def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        last_state = output_hidden(output)
        # With the model spread over devices, each state is where its block is.
        for sequence in zip(*(state.to(last_state.device) for state in states), last_state, strict=True):
            unit = torch.stack([torch.nn.functional.normalize(state.float(), dim=-1) for state in sequence])
            flat = unit.flatten(1)
            sums[0] += (flat @ flat.T).double().cpu() / unit.shape[1]
            sums[1] += (unit[:, -1] @ unit[:, -1].T).double().cpu()
        states.clear()

    handles = [block.module.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].module.register_forward_hook(leave, with_kwargs=True))
    try:
        # Not block by block, which would hold every batch at once; so a streamed model is read once for each batch.
        BlockDriver(driver.view, driver.batch_size).run(input_ids, "similarity of blocks")
    finally:
        for handle in handles:
            handle.remove()
    mean, last = sums / input_ids.shape[0]
    return BlockSimilarity(mean.contiguous(), last.contiguous())
