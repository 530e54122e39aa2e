"""Stores of the Gram matrices of all blocks: in memory, or in a folder that is read one matrix at a time."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cfsp.calibration.gram import Gram, GramRequest, GramSums, expert_kind, reported
from cfsp.errors import CheckpointError, RunError
from cfsp.system.lease import hold_lease
from cfsp.weights.shard_writer import TensorSpec, write_file
from cfsp.weights.shards import Shards

if TYPE_CHECKING:
    from cfsp.architecture.views import BlockView

log = logging.getLogger(__name__)


class GramMatrices(Protocol):
    """Interface to the Gram matrices of every block; ``kind`` is ffn, attention or that of an expert."""

    def read(self, block: int, kind: str) -> Gram: ...

    def tokens(self, block: int, kind: str) -> tuple[int, int | None]: ...

    def keep(self, block: int, grams: Mapping[str, Gram]) -> None: ...

    def has(self, block: int, kinds: Sequence[str]) -> bool: ...


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

    def tokens(self, block: int, kind: str) -> tuple[int, int | None]:
        gram = self._found[block, kind]
        return gram.tokens, None if gram.held_out is None else gram.held_out.tokens


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
        parts = dict(grams)
        parts |= {f"{kind}.held_out": gram.held_out for kind, gram in grams.items() if gram.held_out is not None}
        tensors = {name: gram.matrix for name, gram in parts.items()}
        tensors |= {f"{name}.mean": gram.mean for name, gram in parts.items()}
        described = [TensorSpec(kind, tuple(tensor.shape), tensor.dtype) for kind, tensor in tensors.items()]
        write_file(place / "gram.safetensors", described, iter(tensors.items()))
        (place / "tokens.json").write_text(json.dumps({name: gram.tokens for name, gram in parts.items()}))

    def read(self, block: int, kind: str) -> Gram:
        """Read the matrices of a block.

        Raises:
            RunError: somebody has deleted or damaged them since they were collected.
        """
        with self._undamaged(block) as place:
            tokens, shards = self._read_tokens(place), Shards(place)

            def read(name: str, held_out: Gram | None = None) -> Gram:
                return Gram(shards.read(name), shards.read(f"{name}.mean"), int(tokens[name]), held_out)

            return read(kind, read(f"{kind}.held_out") if f"{kind}.held_out" in tokens else None)

    def tokens(self, block: int, kind: str) -> tuple[int, int | None]:
        """Return the number of tokens of a matrix, and of those that are held out; None: nothing is held out.

        Raises:
            RunError: as :meth:`read`.
        """
        with self._undamaged(block) as place:
            tokens = self._read_tokens(place)
            held_out = tokens.get(f"{kind}.held_out")
            return int(tokens[kind]), None if held_out is None else int(held_out)

    @staticmethod
    def _read_tokens(place: Path) -> dict[str, int]:
        found: dict[str, int] = json.loads((place / "tokens.json").read_text(encoding="utf-8"))
        return found

    @contextmanager
    def _undamaged(self, block: int) -> Iterator[Path]:
        """Yield the folder of a block; errors inside ``with`` become a RunError that says what to do."""
        try:
            yield self._place(block)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError) as error:
            raise RunError(
                f"paths.cache_dir={self.folder}: the Gram matrices of block {block} were deleted or damaged "
                "while the run went on; give the same command again"
            ) from error

    def has(self, block: int, kinds: Sequence[str]) -> bool:
        """Return whether the matrices of a block exist and are undamaged."""
        try:
            shards = Shards(self._place(block)) if kinds else ()
            return all(kind in shards for kind in kinds) and bool(
                json.loads((self._place(block) / "tokens.json").read_text(encoding="utf-8")) or not kinds
            )
        except Exception:  # any damage: they are collected again
            return False

    def _place(self, block: int) -> Path:
        return self.folder / str(block)


def gram_bytes(blocks: Sequence[BlockView], request: GramRequest) -> int:
    """Return the bytes of the matrices of all blocks together."""
    copies = 1 if request.hold_out == "nothing" else 2
    widths = [part.n for block in blocks for kind, part in block.channels.items() if kind in request.kinds]
    if "ffn" in request.kinds:
        widths += [block.experts.width for block in blocks if block.experts for _ in range(block.experts.n_experts)]
    return sum(4 * copies * width**2 for width in widths)


def collected_kinds(block: BlockView, request: GramRequest) -> list[str]:
    """Return the requested kinds of matrices that the block has."""
    experts = block.experts.n_experts if block.experts is not None and "ffn" in request.kinds else 0
    return [*(kind for kind in block.channels if kind in request.kinds), *map(expert_kind, range(experts))]


def few_token_experts(block: BlockView, grams: GramMatrices) -> list[int]:
    """Return the experts of a mixture whose Gram matrix is of too few tokens to select or refit neurons by it.

    With fewer tokens than neurons the matrix is singular: whatever goes, the rest can be refitted without an error on
    these tokens. Where tokens are held out, an expert must have some of both parts.
    """
    mixture, few = block.experts, []
    assert mixture is not None
    for expert in range(mixture.n_experts):
        tokens, held_out = grams.tokens(block.index, expert_kind(expert))
        if tokens < mixture.width or (held_out is not None and not 0 < held_out < tokens):
            few.append(expert)
    return few


class GramCollection:
    """Collection of the Gram matrices of a model, in memory or in a folder."""

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
        return all(self.matrices.has(block.index, collected_kinds(block, self.request)) for block in self._blocks)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the folder inside ``with``, so that a second process waits and then reads the matrices."""
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
