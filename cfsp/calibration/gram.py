"""Gram matrices of the inputs of down_proj and o_proj, for least squares and second-order selection.

They are an item of their own beside the core statistics: collected only when asked, in fp32, on a share of the tokens,
and kept in a file that is read one matrix at a time, since those of a large model do not fit into memory together.
Where a refit chooses its strength from data, the moments of the sequences that are held out are kept beside those of
all tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from cfsp.calibration.inputs import watch_inputs
from cfsp.calibration.routing import Routing, watch_routing
from cfsp.errors import RunError

if TYPE_CHECKING:
    from cfsp.architecture.views import BlockView, Channels

log = logging.getLogger(__name__)

#: Part of the cache key: raise it whenever the collected values or their computation change.
GRAM_VERSION = 1
#: One sequence (or token) of so many is held out.
HELD_OUT = 4
#: Rows of the product that are computed at a time: only blocks on and right of the diagonal are.
_PANEL = 512
#: What is held out: nothing, whole sequences, or tokens where there are too few sequences.
HoldOut = Literal["nothing", "sequences", "tokens"]


@dataclass(frozen=True)
class Gram:
    """Second moments of the input channels of one linear.

    Attributes:
        matrix: X^T X / tokens [N, N] fp32, symmetric.
        mean: mean of each channel [N].
        tokens: number of tokens.
        held_out: the same of the tokens that are held out, which count in ``matrix`` too; None: nothing is held out.
    """

    matrix: Tensor
    mean: Tensor
    tokens: int
    held_out: Gram | None = None

    def fitted(self) -> Gram:
        """Return the moments of the tokens that are not held out, in float64."""
        held = self.held_out
        if held is None:
            return self
        n = max(self.tokens - held.tokens, 1)
        matrix, mean = (
            (self.tokens * whole.double() - held.tokens * part.double()) / n
            for whole, part in ((self.matrix, held.matrix), (self.mean, held.mean))
        )
        return Gram(matrix, mean, n)


def subsample_tokens(values: Tensor, stride: float) -> Tensor:
    """Take every ``stride``-th token of each sequence of ``values`` [B, T, ...]; positions are rounded up."""
    if float(stride).is_integer():
        return values[:, :: int(stride)]
    # The subtraction keeps a whole number with a rounding error from being rounded up.
    positions = [math.ceil(k * stride - 1e-9) for k in range(math.ceil(values.shape[1] / stride))]
    return values[:, [index for index in positions if index < values.shape[1]]]


@dataclass
class HeldOutRows:
    """Tell which rows of batches that come in order are held out: every fourth sequence, or every fourth token.

    Attributes:
        unit: what is held out, sequences or tokens.
        seen: sequences or tokens so far.
    """

    unit: HoldOut
    seen: int = 0

    @classmethod
    def among(cls, sequences: int) -> HeldOutRows:
        """Hold out sequences where there are enough, because the tokens of one sequence are alike; else tokens."""
        return cls("sequences" if sequences >= HELD_OUT else "tokens")

    def mask(self, sequences: int, tokens: int, device: torch.device) -> Tensor:
        """Return a mask over the rows [sequences * tokens] of the next batch; its rows are sequence after sequence."""
        n = sequences if self.unit == "sequences" else sequences * tokens
        chosen = torch.arange(self.seen, self.seen + n, device=device) % HELD_OUT == HELD_OUT - 1
        self.seen += n
        return chosen.repeat_interleave(tokens) if self.unit == "sequences" else chosen


class GramSums:
    """Add up X^T X of the inputs of one linear, in fp32, from every ``stride``-th token of each sequence."""

    def __init__(self, channels: int, device: torch.device, stride: float, hold_out: HoldOut = "nothing") -> None:
        self.matrix = torch.zeros(channels, channels, dtype=torch.float32, device=device)
        self.sums = torch.zeros(channels, dtype=torch.float64, device=device)
        self.stride, self.tokens = stride, 0
        self._rows = HeldOutRows(hold_out)
        self._held = None if hold_out == "nothing" else GramSums(channels, device, 1)

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        values = subsample_tokens(args[0].detach(), self.stride)
        rows = values.flatten(0, 1).float()
        if self._held is None:
            self.add(rows)
            return
        self.add_apart(rows, self._rows.mask(values.shape[0], values.shape[1], rows.device))

    def add_apart(self, rows: Tensor, held_out: Tensor | None) -> None:
        """Add rows [n, N], of which ``held_out`` [n] marks those that are held out."""
        if self._held is None or held_out is None:
            self.add(rows)
            return
        self.add(rows[~held_out])
        self._held.add(rows[held_out])

    def add(self, rows: Tensor) -> None:
        """Add rows [n, N]."""
        self.tokens += len(rows)
        self.sums += rows.sum(0)
        for start in range(0, rows.shape[1], _PANEL):
            panel = slice(start, start + _PANEL)
            self.matrix[panel, start:].addmm_(rows[:, panel].T, rows[:, start:])

    def report(self) -> Gram:
        """Return the Gram matrix; batches added after the call do not count.

        The lower triangle is filled from the upper one, in place, and on a CPU the sums become the matrix: the sums of
        all blocks may take half of the free memory, so there is no room for a second set.
        """
        held = None
        if self._held is not None:  # the rows that are held out were added up apart, so that no row is multiplied twice
            self.matrix += self._held.matrix
            self.sums += self._held.sums
            self.tokens += self._held.tokens
            held = self._held.report()
        tokens, matrix = max(self.tokens, 1), self.matrix
        matrix.div_(tokens)
        for start in range(0, len(matrix), _PANEL):
            panel, after = slice(start, start + _PANEL), slice(start + _PANEL, None)
            matrix[after, panel] = matrix[panel, after].T
            square = matrix[panel, panel].triu()
            matrix[panel, panel] = square + square.triu(1).T
        self.matrix = matrix.new_zeros(0, 0)
        return Gram(matrix.cpu(), (self.sums / tokens).float().cpu(), self.tokens, held)


def expert_kind(expert: int) -> str:
    """Return the kind under which the Gram matrix of one expert of a mixture is kept."""
    return f"ffn.{expert}"


class ExpertGramSums:
    """Add up X^T X of the inputs of every expert's down matrix over the tokens that are routed to it, in fp32.

    Hooks cannot see these inputs, so each expert runs once more here on its tokens, as in
    :class:`cfsp.calibration.expert_collectors.ExpertSums`. The tokens that are taken and held out are those of a
    dense FFN: every ``stride``-th of each sequence, whichever expert it is routed to.
    """

    def __init__(self, block: BlockView, request: GramRequest) -> None:
        mixture = block.experts
        assert mixture is not None
        self.mixture, self.stride = mixture, request.stride
        self.sums = {
            expert_kind(expert): GramSums(mixture.width, mixture.device, 1, request.hold_out)
            for expert in range(mixture.n_experts)
        }
        self._rows = None if request.hold_out == "nothing" else HeldOutRows(request.hold_out)

    @torch.no_grad()
    def __call__(self, routing: Routing, shape: tuple[int, int]) -> None:
        """Add one batch of shape [B, T]."""
        device = routing.states.device
        taken = subsample_tokens(torch.arange(shape[0] * shape[1], device=device).view(shape), self.stride)
        is_taken, is_held_out = torch.zeros(2, shape[0] * shape[1], dtype=torch.bool, device=device)
        is_taken[taken.flatten()] = True
        if self._rows is not None:
            is_held_out[taken.flatten()] = self._rows.mask(taken.shape[0], taken.shape[1], device)
        for expert, sums in enumerate(self.sums.values()):
            token, _ = routing.of(expert)
            token = token[is_taken[token]]
            if len(token):
                inputs, _ = self.mixture.run(expert, routing.states[token])
                sums.add_apart(inputs.float(), is_held_out[token])


def reported(block: int, sums: Mapping[str, GramSums]) -> dict[str, Gram]:
    """Return the matrices of one block: kind -> matrix.

    Raises:
        RunError: a matrix is not finite, so selection and refits are impossible.
    """
    grams = {kind: kind_sums.report() for kind, kind_sums in sums.items()}
    for kind, gram in grams.items():
        if not bool(gram.matrix.isfinite().all()):
            raise RunError(
                f"block {block}: the Gram matrix of its {kind} is not finite; try model.dtype=float32, or a metric and "
                "a compensation that need none (importance=cfsp, pruner.compensation=bias)"
            )
    return grams


@dataclass(frozen=True)
class GramRequest:
    """Request for Gram matrices.

    Attributes:
        kinds: ffn, attention, or both.
        share: share of the tokens, taken evenly.
        limit: bytes of matrices that may be in memory together.
        hold_out: what is held out.
    """

    kinds: tuple[str, ...]
    share: float
    limit: int
    hold_out: HoldOut = "nothing"

    @property
    def stride(self) -> float:
        """Return the distance between two collected tokens: 1 / share, which may be fractional."""
        stride = 1 / self.share
        return round(stride) if math.isclose(stride, round(stride), rel_tol=1e-6) else stride


class CrossSums:
    """Add up X^T E / tokens [N, d] fp32, where X enters one linear and E is missing from its block's output."""

    def __init__(self, channels: Channels, stride: float, hold_out: HoldOut = "nothing") -> None:
        weight = channels.output.weight
        self.matrix = torch.zeros(channels.n, weight.shape[0], dtype=torch.float32, device=weight.device)
        self.stride, self.tokens = stride, 0
        self._rows = HeldOutRows(hold_out)
        self._held = None if hold_out == "nothing" else CrossSums(channels, stride)

    def add(self, entering: Tensor, missing: Tensor) -> None:
        """Add one batch: the input of the linear [B, T, N], and E [B, T, d]."""
        x, e = (subsample_tokens(value, self.stride) for value in (entering, missing))
        rows = tuple(value.flatten(0, 1).float() for value in (x, e))
        if self._held is None:
            self._add(*rows)
            return
        out = self._rows.mask(x.shape[0], x.shape[1], x.device)
        self._add(*(values[~out] for values in rows))
        self._held._add(*(values[out] for values in rows))

    def _add(self, x: Tensor, e: Tensor) -> None:
        self.matrix.addmm_(x.T, e)
        self.tokens += len(x)

    def report(self) -> Tensor:
        """Return X^T E / tokens over all tokens."""
        if self._held is None:
            return self.matrix / max(self.tokens, 1)
        return (self.matrix + self._held.matrix) / max(self.tokens + self._held.tokens, 1)

    def report_parts(self) -> tuple[Tensor, Tensor]:
        """Return X^T E / tokens over the tokens to fit to, and over those that are held out."""
        assert self._held is not None
        return self.matrix / max(self.tokens, 1), self._held.report()


@contextmanager
def gram_sums(blocks: Sequence[BlockView], request: GramRequest | None) -> Iterator[list[dict[str, GramSums]]]:
    """Collect Gram matrices inside ``with`` while the model runs; the hooks are removed afterwards.

    Args:
        request: matrices to collect; None: none.

    Yields:
        For each block, kind -> sums; in a mixture each expert has a kind of its own (:func:`expert_kind`).
    """
    sums: list[dict[str, GramSums]] = []
    handles: list[Callable[[], None]] = []
    try:
        for block in blocks:
            block_sums = {}
            for kind, channels in block.channels.items():
                if request is not None and kind in request.kinds:
                    kind_sums = GramSums(channels.n, channels.output.weight.device, request.stride, request.hold_out)
                    handles += watch_inputs(block, channels.output, kind_sums)
                    block_sums[kind] = kind_sums
            if request is not None and "ffn" in request.kinds and block.experts is not None:
                expert_sums = ExpertGramSums(block, request)
                handles += watch_routing(block, expert_sums)
                block_sums |= expert_sums.sums
            sums.append(block_sums)
        yield sums
    finally:
        for remove in handles:
            remove()
