"""Collectors for mixtures of experts: the core statistics of the neurons of every expert, and its token counts."""

from __future__ import annotations

import torch
from torch import Tensor

from cfsp.architecture.experts import ExpertsFFN
from cfsp.calibration.routing import Routing
from cfsp.calibration.statistics import ExpertStatistics, InputStatistics

#: Part of the cache key of models with mixtures: raise it whenever the collected values or their computation change.
EXPERTS_VERSION = 1


class ExpertSums:
    """Add up the inputs of every expert's down matrix over the tokens that are routed to it, in fp64.

    Hooks cannot see these inputs, because all experts run in one kernel. So each expert runs once more here on its
    tokens. Each sequence is added on its own, in order.
    """

    def __init__(self, mixture: ExpertsFFN, device: torch.device) -> None:
        self.mixture = mixture
        self.sums = torch.zeros(3, mixture.n_experts, mixture.width, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(mixture.n_experts, dtype=torch.float64, device=device)
        self.contribution = torch.zeros_like(self.tokens)

    @torch.no_grad()
    def __call__(self, routing: Routing, shape: tuple[int, int]) -> None:
        """Add one batch.

        Args:
            routing: routing of the tokens of the batch.
            shape: shape [B, T] of the batch.
        """
        sequences, length = shape
        for expert in range(self.mixture.n_experts):
            token, weight = routing.of(expert)
            if not len(token):
                continue
            activation, output = self.mixture.run(expert, routing.states[token])
            self.tokens[expert] += len(token)
            self.contribution[expert] += (output.float().norm(dim=1) * weight.float().abs()).double().sum()
            in_each = (token // length).bincount(minlength=sequences).tolist()
            # Token indices are ascending, so the tokens of one sequence are adjacent.
            for part in activation.split(in_each):
                if len(part):
                    self.sums[:, expert] += _sequence_sums(part)

    def report(self, n_sequences: int, seq_len: int) -> tuple[InputStatistics, ExpertStatistics]:
        tokens = n_sequences * seq_len
        total, squares, norms = self.sums.cpu()
        inputs = InputStatistics(total / tokens, squares / tokens, norms / (n_sequences * seq_len**0.5))
        return inputs, ExpertStatistics(self.tokens.cpu(), self.contribution.cpu() / tokens)


def _sequence_sums(activation: Tensor) -> Tensor:
    """Return the sum, the sum of squares and the L2 norm over the tokens: [n, N] -> [3, N]."""
    values = activation.to(torch.promote_types(activation.dtype, torch.float32))
    squares = values.square().sum(0).double()
    return torch.stack([values.sum(0).double(), squares, squares.sqrt()])
