"""Stores of the Gram matrices of all blocks: in memory, or in a folder that is read one matrix at a time."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cfsp.calibration.gram import Gram, GramRequest, GramSums, reported
from cfsp.errors import CheckpointError, RunError
from cfsp.system.lease import hold_lease
from cfsp.weights.shard_writer import TensorSpec, write_file
from cfsp.weights.shards import Shards

if TYPE_CHECKING:
    from cfsp.architecture.views import BlockView

log = logging.getLogger(__name__)


class GramMatrices(Protocol):
    """Interface to the Gram matrices of every block; ``kind`` is ffn or attention."""

    def read(self, block: int, kind: str) -> Gram: ...

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
        place = self._place(block)
        try:
            tokens = json.loads((place / "tokens.json").read_text(encoding="utf-8"))
            shards = Shards(place)

            def read(name: str, held_out: Gram | None = None) -> Gram:
                return Gram(shards.read(name), shards.read(f"{name}.mean"), int(tokens[name]), held_out)

            return read(kind, read(f"{kind}.held_out") if f"{kind}.held_out" in tokens else None)
        except (OSError, ValueError, KeyError, TypeError, CheckpointError) as error:
            raise RunError(
                f"paths.cache_dir={self.folder}: the Gram matrices of block {block} were deleted or damaged "
                "while the run went on; give the same command again"
            ) from error

    def has(self, block: int, kinds: Sequence[str]) -> bool:
        """Return whether the matrices of a block exist and are undamaged."""
        try:
            return all(kind in Shards(self._place(block)) for kind in kinds) and bool(
                json.loads((self._place(block) / "tokens.json").read_text(encoding="utf-8")) or not kinds
            )
        except Exception:  # any damage: they are collected again
            return False

    def _place(self, block: int) -> Path:
        return self.folder / str(block)


def gram_bytes(blocks: Sequence[BlockView], request: GramRequest) -> int:
    """Return the bytes of the matrices of all blocks together."""
    channels = [
        kind_channels for block in blocks for kind, kind_channels in block.channels.items() if kind in request.kinds
    ]
    copies = 1 if request.hold_out == "nothing" else 2
    return sum(4 * copies * part.n**2 for part in channels)


def collected_kinds(block: BlockView, request: GramRequest) -> list[str]:
    """Return the requested kinds of matrices that the block has."""
    return [kind for kind in block.channels if kind in request.kinds]


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
