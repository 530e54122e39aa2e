"""Core statistics of one forward pass over the calibration set; all are collected, whichever metric is used.

They are accumulated per sequence in fp64 in a fixed order and reported per token, so that nothing depends on the number
of tokens except through noise.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Block distances that are always collected, in the order in which they are stored.
DISTANCES = ("angular", "cosine", "mse", "mae")


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of the input channels of one linear layer, [N] fp64 each.

    In a mixture of experts they are [E, N] and describe the inputs of each expert's down matrix before the routing
    weight. A token that is not routed to an expert counts there as 0, so that neurons which few tokens use weigh less.

    Attributes:
        mean: over all tokens.
        mean_square: over all tokens.
        mean_norm: mean over sequences of the channel's L2 norm over the sequence's tokens, divided by the square root
            of the sequence length.
    """

    mean: Tensor
    mean_square: Tensor
    mean_norm: Tensor

    def expert(self, index: int) -> InputStatistics:
        """Return the statistics [N] of one expert."""
        return InputStatistics(self.mean[index], self.mean_square[index], self.mean_norm[index])

    @property
    def rms(self) -> Tensor:
        """Return the root mean square activation [N]: the L2 norm X_i of a neuron, per token."""
        return self.mean_square.sqrt()

    @property
    def variance(self) -> Tensor:
        """Return the population variance [N]."""
        return (self.mean_square - self.mean.square()).clamp_min(0)


@dataclass(frozen=True)
class ExpertStatistics:
    """Statistics of the experts of a mixture, [E] fp64 each.

    Attributes:
        tokens: number of calibration tokens that were routed to the expert.
        contribution: L2 norm of its part of the mixture's output (routing weight * output), mean over all tokens.
    """

    tokens: Tensor
    contribution: Tensor

    @property
    def unseen(self) -> list[int]:
        """Return the experts that saw no token."""
        return (self.tokens == 0).nonzero().flatten().tolist()


@dataclass(frozen=True)
class BlockStatistics:
    """Statistics of one block.

    Attributes:
        distances: name -> mean block distance.
        ffn: inputs of down_proj, in a mixture those of every expert; None: no FFN was recognised.
        attention: inputs of o_proj; None: no attention was recognised.
        experts: statistics of the experts of a mixture; None for another block.
    """

    distances: dict[str, float]
    ffn: InputStatistics | None
    attention: InputStatistics | None
    experts: ExpertStatistics | None = None


@dataclass(frozen=True)
class Statistics:
    """Statistics of every block, collected on ``n_sequences`` sequences of ``seq_len`` tokens."""

    blocks: tuple[BlockStatistics, ...]
    n_sequences: int
    seq_len: int

    def distance(self, metric: str) -> Tensor:
        """Return the mean distance between the hidden states entering and leaving each block, [L] fp64."""
        return torch.tensor([block.distances[metric] for block in self.blocks], dtype=torch.float64)

    def save(self, path: Path, metadata: dict[str, Any]) -> None:
        """Write one safetensors file."""
        from safetensors.torch import save_file

        tensors = {"distances": torch.stack([self.distance(metric) for metric in DISTANCES], dim=1)}
        for index, block in enumerate(self.blocks):
            for part, inputs in (("ffn", block.ffn), ("attention", block.attention), ("experts", block.experts)):
                if inputs is not None:
                    tensors |= {f"{index}.{part}.{name}": value for name, value in vars(inputs).items()}
        header = {"n_sequences": self.n_sequences, "seq_len": self.seq_len, **metadata}
        save_file(tensors, path, metadata={"cfsp": json.dumps(header)})

    @staticmethod
    def load(path: Path) -> Statistics:
        """Read a file that :meth:`save` wrote."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as stream:
            header = json.loads(stream.metadata()["cfsp"])
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        blocks = []
        for index, row in enumerate(tensors["distances"].tolist()):
            parts = {
                part: InputStatistics(
                    *(tensors[f"{index}.{part}.{name}"] for name in ("mean", "mean_square", "mean_norm"))
                )
                for part in ("ffn", "attention")
                if f"{index}.{part}.mean" in tensors
            }
            distances = dict(zip(DISTANCES, row, strict=True))
            experts = None
            if f"{index}.experts.tokens" in tensors:
                experts = ExpertStatistics(*(tensors[f"{index}.experts.{name}"] for name in ("tokens", "contribution")))
            blocks.append(BlockStatistics(distances, parts.get("ffn"), parts.get("attention"), experts))
        return Statistics(tuple(blocks), header["n_sequences"], header["seq_len"])
