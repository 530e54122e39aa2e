"""Gram matrices of the inputs of down_proj and o_proj, for least squares and second-order selection.

They are an item of their own beside the core statistics: collected only when asked, in fp32, on a share of the tokens,
and kept in a file that is read one matrix at a time, since those of a large model do not fit into memory together.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from cfsp.calibration.inputs import watch_inputs
from cfsp.errors import CheckpointError, RunError
from cfsp.system.lease import hold_lease
from cfsp.weights.shard_writer import TensorSpec, write_file
from cfsp.weights.shards import Shards

if TYPE_CHECKING:
    from cfsp.architecture.views import BlockView, Channels

log = logging.getLogger(__name__)

#: Part of the cache key: raise it whenever what is collected, or how, changes.
GRAM_VERSION = 1
#: Rows of the product that are computed at a time: only blocks on and right of the diagonal are.
_PANEL = 512


@dataclass(frozen=True)
class Gram:
    """Second moments of the input channels of one linear.

    Attributes:
        matrix: X^T X / tokens [N, N] fp32, symmetric.
        mean: mean of each channel [N].
        tokens: number of tokens.
    """

    matrix: Tensor
    mean: Tensor
    tokens: int


def subsample_tokens(values: Tensor, stride: float) -> Tensor:
    """Take every ``stride``-th token of each sequence of ``values`` [B, T, ...]; positions are rounded up."""
    if float(stride).is_integer():
        return values[:, :: int(stride)]
    # The subtraction keeps a whole number that came out of a division from being rounded up to the next one.
    positions = [math.ceil(k * stride - 1e-9) for k in range(math.ceil(values.shape[1] / stride))]
    return values[:, [index for index in positions if index < values.shape[1]]]


class GramSums:
    """Add up X^T X of the inputs of one linear, in fp32, from every ``stride``-th token of each sequence."""

    def __init__(self, channels: int, device: torch.device, stride: float) -> None:
        self.matrix = torch.zeros(channels, channels, dtype=torch.float32, device=device)
        self.sums = torch.zeros(channels, dtype=torch.float64, device=device)
        self.stride, self.tokens = stride, 0

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = subsample_tokens(args[0].detach(), self.stride).flatten(0, 1).float()
        self.tokens += len(rows)
        self.sums += rows.sum(0)
        for start in range(0, rows.shape[1], _PANEL):
            panel = slice(start, start + _PANEL)
            self.matrix[panel, start:].addmm_(rows[:, panel].T, rows[:, start:])

    def report(self) -> Gram:
        """Return the matrix; sums that are added after a report do not count.

        The lower triangle is filled from the upper one, in place, and on a CPU the sums become the matrix: the sums of
        all blocks may take half of the free memory, so there is no room for a second set.
        """
        tokens, matrix = max(self.tokens, 1), self.matrix
        matrix.div_(tokens)
        for start in range(0, len(matrix), _PANEL):
            panel, after = slice(start, start + _PANEL), slice(start + _PANEL, None)
            matrix[after, panel] = matrix[panel, after].T
            square = matrix[panel, panel].triu()
            matrix[panel, panel] = square + square.triu(1).T
        self.matrix = matrix.new_zeros(0, 0)
        return Gram(matrix.cpu(), (self.sums / tokens).float().cpu(), self.tokens)


def reported(block: int, sums: Mapping[str, GramSums]) -> dict[str, Gram]:
    """Return the matrices of one block: kind -> matrix.

    Raises:
        RunError: a matrix is not finite, so that nothing can be selected or refitted by it.
    """
    grams = {kind: kind_sums.report() for kind, kind_sums in sums.items()}
    for kind, gram in grams.items():
        if not bool(gram.matrix.isfinite().all()):
            raise RunError(
                f"block {block}: the Gram matrix of its {kind} is not finite; try model.dtype=float32, or a metric and "
                "a compensation that need none (importance=cfsp, pruner.compensation=bias)"
            )
    return grams


class GramMatrices(Protocol):
    """The Gram matrices of every block; ``kind`` is ffn or attention."""

    def read(self, block: int, kind: str) -> Gram: ...

    def keep(self, block: int, grams: Mapping[str, Gram]) -> None: ...

    def has(self, block: int, kinds: Sequence[str]) -> bool: ...


@dataclass(frozen=True)
class GramRequest:
    """The Gram matrices that are asked for.

    Attributes:
        kinds: ffn, attention, or both.
        share: share of the tokens, taken evenly.
        limit: bytes of matrices that may be in memory together.
    """

    kinds: tuple[str, ...]
    share: float
    limit: int

    @property
    def stride(self) -> float:
        """Return the distance between two tokens that are taken; a whole number where 1 / share is one."""
        stride = 1 / self.share
        return round(stride) if math.isclose(stride, round(stride), rel_tol=1e-6) else stride


class InMemory:
    """Matrices that fit into memory together."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, str], Gram] = {}

    def has(self, block: int, kinds: Sequence[str]) -> bool:
        return all((block, kind) in self._found for kind in kinds)

    def keep(self, block: int, grams: Mapping[str, Gram]) -> None:
        self._found |= {(block, kind): gram for kind, gram in grams.items()}

    def read(self, block: int, kind: str) -> Gram:
        return self._found[block, kind]


class OnDisk:
    """A folder with one safetensors file for each block, read one matrix at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, block: int, grams: Mapping[str, Gram]) -> None:
        """Write the matrices of one block.

        Raises:
            OSError: the disk is full.
        """
        place = self._place(block)
        place.mkdir(parents=True, exist_ok=True)
        tensors = {kind: gram.matrix for kind, gram in grams.items()}
        tensors |= {f"{kind}.mean": gram.mean for kind, gram in grams.items()}
        described = [TensorSpec(kind, tuple(tensor.shape), tensor.dtype) for kind, tensor in tensors.items()]
        write_file(place / "gram.safetensors", described, iter(tensors.items()))
        (place / "tokens.json").write_text(json.dumps({kind: gram.tokens for kind, gram in grams.items()}))

    def read(self, block: int, kind: str) -> Gram:
        """Read the matrices of a block.

        Raises:
            RunError: somebody has deleted or damaged them since they were collected.
        """
        place = self._place(block)
        try:
            tokens = json.loads((place / "tokens.json").read_text(encoding="utf-8"))
            shards = Shards(place)
            return Gram(shards.read(kind), shards.read(f"{kind}.mean"), int(tokens[kind]))
        except (OSError, ValueError, KeyError, TypeError, CheckpointError) as error:
            raise RunError(
                f"paths.cache_dir={self.folder}: the Gram matrices of block {block} were deleted or damaged "
                "while the run went on; give the same command again"
            ) from error

    def has(self, block: int, kinds: Sequence[str]) -> bool:
        """Tell whether the matrices of a block are there, whole."""
        try:
            return all(kind in Shards(self._place(block)) for kind in kinds) and bool(
                json.loads((self._place(block) / "tokens.json").read_text(encoding="utf-8")) or not kinds
            )
        except Exception:  # any damage: they are collected again
            return False

    def _place(self, block: int) -> Path:
        return self.folder / str(block)


class CrossSums:
    """Add up X^T E / tokens [N, d] fp32, where X enters one linear and E is missing from its block's output."""

    def __init__(self, channels: Channels, stride: float) -> None:
        weight = channels.output.weight
        self.matrix = torch.zeros(channels.n, weight.shape[0], dtype=torch.float32, device=weight.device)
        self.stride, self.tokens = stride, 0

    def add(self, entering: Tensor, missing: Tensor) -> None:
        """Add one batch: the input of the linear [B, T, N], and E [B, T, d]."""
        x, e = (subsample_tokens(value, self.stride).flatten(0, 1).float() for value in (entering, missing))
        self.matrix.addmm_(x.T, e)
        self.tokens += len(x)

    def report(self) -> Tensor:
        return self.matrix / max(self.tokens, 1)


@contextmanager
def gram_sums(blocks: Sequence[BlockView], request: GramRequest | None) -> Iterator[list[dict[str, GramSums]]]:
    """Collect Gram matrices while the model runs; the hooks always go away.

    Args:
        request: matrices to collect; None: none.

    Yields:
        For each block, kind -> sums.
    """
    sums: list[dict[str, GramSums]] = []
    handles: list[Callable[[], None]] = []
    try:
        for block in blocks:
            block_sums = {}
            for kind, channels in block.channels.items():
                if request is not None and kind in request.kinds:
                    kind_sums = GramSums(channels.n, channels.output.weight.device, request.stride)
                    handles += watch_inputs(block, channels.output, kind_sums)
                    block_sums[kind] = kind_sums
            sums.append(block_sums)
        yield sums
    finally:
        for remove in handles:
            remove()


def gram_bytes(blocks: Sequence[BlockView], request: GramRequest) -> int:
    """Return the bytes of the matrices of all blocks together."""
    channels = [
        kind_channels for block in blocks for kind, kind_channels in block.channels.items() if kind in request.kinds
    ]
    return sum(4 * part.n**2 for part in channels)


def kinds_of(block: BlockView, request: GramRequest) -> list[str]:
    """Return the kinds of matrices that a block has."""
    return [kind for kind in block.channels if kind in request.kinds]


class GramCollection:
    """The collection of the Gram matrices of a model's blocks."""

    def __init__(self, blocks: Sequence[BlockView], request: GramRequest, folder: Path | None) -> None:
        """Prepare the collection.

        Args:
            blocks: blocks of the model.
            request: matrices to collect.
            folder: where they stay for other runs; None: in memory, which must hold them.
        """
        self.request, self.folder, self._blocks = request, folder, blocks
        self.fits = gram_bytes(blocks, request) <= request.limit
        self.matrices: GramMatrices = InMemory() if folder is None else OnDisk(folder)

    @property
    def complete(self) -> bool:
        return all(self.matrices.has(block.index, kinds_of(block, self.request)) for block in self._blocks)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only process that collects these matrices; another one waits, and finds them there."""
        if self.folder is None:
            yield
            return
        place = self.folder.with_name(f".{self.folder.name}.lease")
        with hold_lease(place, lambda who: log.info("waiting for Gram matrices (%s)", who)):
            yield

    def keep(self, sums: Sequence[Mapping[str, GramSums]], first: int = 0) -> None:
        """Keep the collected matrices of the blocks from ``first`` on.

        Raises:
            RunError: the disk is full, or a matrix is not finite.
        """
        for block, block_sums in enumerate(sums, start=first):
            grams = reported(block, block_sums)
            try:
                self.matrices.keep(block, grams)
            except OSError as error:
                raise RunError(
                    f"paths.cache_dir={self.folder}: the Gram matrices of block {block} cannot be written "
                    f"({error.strerror}); make room, give another paths.cache_dir, or use a method without them "
                    "(pruner.compensation=none or bias, and another importance than obs)"
                ) from error
