"""Forward hooks that turn a pass of the driver into :class:`Statistics`, without copies of activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cfsp.calibrate.statistics import DISTANCES, BlockStatistics, InputStatistics, Statistics
from cfsp.importance.block_distance import block_distances
from cfsp.models.driver import entering, hidden_of
from cfsp.models.views import BlockView, DecoderView

#: Part of the cache key: raise it whenever what is collected, or how, changes.
COLLECTOR_VERSION = 1


class InputSums:
    """fp64 sums over the input channels of one linear; each sequence is added on its own, in order."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.sums = torch.zeros(3, channels, dtype=torch.float64, device=device)

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        activation = args[0].detach()
        norms = torch.linalg.vector_norm(activation, dim=1, dtype=torch.float32).double()
        totals = activation.sum(1, dtype=torch.float32).double()
        for total, norm in zip(totals, norms, strict=True):
            self.sums += torch.stack([total, norm.square(), norm])

    def report(self, n_sequences: int, seq_len: int) -> InputStatistics:
        tokens = n_sequences * seq_len
        total, squares, norms = self.sums.cpu()
        return InputStatistics(total / tokens, squares / tokens, norms / (n_sequences * seq_len**0.5))


class BlockSums:
    """The collectors of one block."""

    def __init__(self, block: BlockView) -> None:
        self.block = block
        device = block.ffn.down.weight.device
        self.distances = torch.zeros(len(DISTANCES), dtype=torch.float64, device=device)
        self.ffn = InputSums(block.ffn.width, device)
        attention = block.attention
        self.attention = None if attention is None else InputSums(attention.o_proj.in_features, device)

    def _distance(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        for sequence in block_distances(entering(args, kwargs), hidden_of(output)):
            self.distances += sequence

    def attach(self) -> list[Callable[[], None]]:
        """Register the hooks; returns what removes them."""
        handles = [self.block.module.register_forward_hook(self._distance, with_kwargs=True)]
        handles.append(self.block.ffn.down.register_forward_pre_hook(self.ffn))
        if self.block.attention is not None and self.attention is not None:
            handles.append(self.block.attention.o_proj.register_forward_pre_hook(self.attention))
        return [handle.remove for handle in handles]

    def report(self, n_sequences: int, seq_len: int) -> BlockStatistics:
        means = (self.distances / (n_sequences * seq_len)).tolist()
        attention = None if self.attention is None else self.attention.report(n_sequences, seq_len)
        return BlockStatistics(
            dict(zip(DISTANCES, means, strict=True)), self.ffn.report(n_sequences, seq_len), attention
        )


@contextmanager
def collecting(view: DecoderView) -> Iterator[list[BlockSums]]:
    """Collect the core set while the block runs the model; hooks go away whatever happens."""
    sums = [BlockSums(block) for block in view.blocks]
    removers = [remover for block in sums for remover in block.attach()]
    try:
        yield sums
    finally:
        for remove in removers:
            remove()


def report(sums: list[BlockSums], n_sequences: int, seq_len: int) -> Statistics:
    """The statistics of what was collected."""
    return Statistics(tuple(block.report(n_sequences, seq_len) for block in sums), n_sequences, seq_len)
