"""Forward hooks that collect :class:`Statistics` while the driver runs, without copies of activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cfsp.architecture.views import BlockView
from cfsp.calibration.block_distance import block_distances
from cfsp.calibration.expert_collectors import ExpertSums
from cfsp.calibration.inputs import watch_inputs
from cfsp.calibration.routing import watch_routing
from cfsp.calibration.statistics import DISTANCES, BlockStatistics, InputStatistics, Statistics
from cfsp.model.block_calls import input_hidden, output_hidden

#: Part of the cache key: raise it whenever the collected values or their computation change.
COLLECTOR_VERSION = 2


class InputSums:
    """Add up the inputs of one linear per channel, in fp64; each sequence is added on its own, in order."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.sums = torch.zeros(3, channels, dtype=torch.float64, device=device)

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        activation = args[0].detach()
        dtype = torch.promote_types(activation.dtype, torch.float32)
        totals = activation.sum(1, dtype=dtype).double()
        squares = _sums_of_squares(activation, dtype).double()
        for sequence in torch.stack([totals, squares, squares.sqrt()], dim=1):
            self.sums += sequence

    def report(self, n_sequences: int, seq_len: int) -> InputStatistics:
        tokens = n_sequences * seq_len
        total, squares, norms = self.sums.cpu()
        return InputStatistics(total / tokens, squares / tokens, norms / (n_sequences * seq_len**0.5))


def _sums_of_squares(activation: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum the squares over the tokens of each sequence: [B, T, N] -> [B, N]."""
    if activation.device.type != "cpu":
        return torch.linalg.vector_norm(activation, dim=1, dtype=dtype).square()
    # A norm along a strided dimension is not vectorised on a CPU; one sequence at a time stays in its cache.
    return torch.stack([sequence.to(dtype).square().sum(0) for sequence in activation])


class BlockSums:
    """Collectors of the core statistics of one block."""

    def __init__(self, block: BlockView) -> None:
        self.block = block
        # This covers a streamed block too, while its weights are in memory.
        device = next(block.module.parameters()).device
        self.distances = torch.zeros(len(DISTANCES), dtype=torch.float64, device=device)
        self.inputs = {kind: InputSums(channels.n, device) for kind, channels in block.channels.items()}
        self.experts = None if block.experts is None else ExpertSums(block.experts, device)

    def _distance(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        y = output_hidden(output)
        # With a model that accelerate spreads over devices, this hook runs before accelerate's has moved the input.
        x = input_hidden(args, kwargs).to(y.device)
        # On a CPU one sequence at a time, to keep intermediate values small; on a GPU the number of kernels counts.
        for before, after in zip(x.split(1), y.split(1), strict=True) if y.device.type == "cpu" else [(x, y)]:
            for sequence in block_distances(before, after):
                self.distances += sequence

    def attach(self) -> list[Callable[[], None]]:
        """Register the hooks.

        Returns:
            Functions that remove them.
        """
        removers = [self.block.module.register_forward_hook(self._distance, with_kwargs=True).remove]
        for kind, channels in self.block.channels.items():
            removers += watch_inputs(self.block, channels.output, self.inputs[kind])
        if self.experts is not None:
            removers += watch_routing(self.block, self.experts)
        return removers

    def report(self, n_sequences: int, seq_len: int) -> BlockStatistics:
        means = (self.distances / (n_sequences * seq_len)).tolist()
        inputs = {kind: sums.report(n_sequences, seq_len) for kind, sums in self.inputs.items()}
        ffn, experts = inputs.get("ffn"), None
        if self.experts is not None:
            ffn, experts = self.experts.report(n_sequences, seq_len)
        return BlockStatistics(dict(zip(DISTANCES, means, strict=True)), ffn, inputs.get("attention"), experts)


@contextmanager
def collecting(blocks: Sequence[BlockView]) -> Iterator[list[BlockSums]]:
    """Collect the core statistics of ``blocks`` inside ``with``; the hooks are removed afterwards."""
    sums = [BlockSums(block) for block in blocks]
    removers = [remover for block in sums for remover in block.attach()]
    try:
        yield sums
    finally:
        for remove in removers:
            remove()


def report(sums: list[BlockSums], n_sequences: int, seq_len: int) -> Statistics:
    """Return the statistics, computed from the collected sums."""
    return Statistics(tuple(block.report(n_sequences, seq_len) for block in sums), n_sequences, seq_len)
