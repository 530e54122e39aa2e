"""Writing of safetensors files tensor by tensor, so that a file is never in memory as a whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from cfsp.system.atomic import naming
from cfsp.system.background_hash import HashingWriter
from cfsp.system.progress import Work, working
from cfsp.weights.shards import DTYPES, INDEX, WEIGHTS

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a checkpoint to be written.

    Attributes:
        name: its name in the checkpoint.
        shape: its shape.
        dtype: the dtype that it is stored in.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


def write_shards(
    folder: Path,
    tensors: Sequence[TensorSpec],
    values: Callable[[list[str]], Iterator[tuple[str, Tensor]]],
    limit: int,
) -> int:
    """Write ``tensors`` to as many files of at most ``limit`` bytes as they need, with an index if there are several.

    A file that is there already with the right header and size is kept, because a stopped run had finished it.

    Args:
        folder: an existing folder.
        tensors: the tensors in the order in which they are written.
        values: yields (name, tensor) for the names asked for, in their order.
        limit: most bytes of tensors in a file; a larger tensor gets a file of its own.

    Returns:
        The bytes of all files.
    """
    shards = list(_shards(tensors, limit))
    names = [
        WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    missing = {name: shard for name, shard in zip(names, shards, strict=True) if not _holds(folder / name, shard)}
    unwritten = [spec.name for shard in missing.values() for spec in shard]
    with working("write weights", len(unwritten), "tensor") as work:
        source = _counted(values(unwritten), work)
        for name, shard in missing.items():
            write_file(folder / f"{name}.partial", shard, source, True)
            (folder / f"{name}.partial").rename(folder / name)
    if len(shards) > 1:
        by_file = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        index = {"metadata": {"total_size": sum(spec.size for spec in tensors)}, "weight_map": by_file}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _counted(source: Iterator[tuple[str, Tensor]], work: Work) -> Iterator[tuple[str, Tensor]]:
    for entry in source:
        yield entry
        work.advance()


def _shards(tensors: Sequence[TensorSpec], limit: int) -> Iterator[list[TensorSpec]]:
    shard: list[TensorSpec] = []
    for spec in tensors:
        if shard and sum(other.size for other in shard) + spec.size > limit:
            yield shard
            shard = []
        shard.append(spec)
    yield shard


def _holds(file: Path, tensors: Sequence[TensorSpec]) -> bool:
    """Return whether ``file`` is there with the header and the size that ``tensors`` ask for."""
    header = _header(tensors)
    try:
        with file.open("rb") as stream:
            expected = len(header) + sum(spec.size for spec in tensors)
            return stream.read(len(header)) == header and os.fstat(stream.fileno()).st_size == expected
    except OSError:
        return False


def write_file(
    file: Path, tensors: Sequence[TensorSpec], source: Iterator[tuple[str, Tensor]], hashed: bool = False
) -> None:
    """Write one safetensors file.

    Args:
        file: the file.
        tensors: the tensors in their order.
        source: yields (name, tensor) in the same order; as many are taken as the file holds.
        hashed: compute the file's sha256 on the way, for :func:`cfsp.system.background_hash.sha256_of`.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    with naming(file), file.open("wb") as stream:
        writer = HashingWriter(stream, hashed=hashed)
        written = False
        try:
            writer.write(_header(tensors))
            for spec in tensors:
                name, tensor = next(source)
                assert (name, tuple(tensor.shape)) == (spec.name, spec.shape)
                contiguous = tensor.detach().to(device="cpu", dtype=spec.dtype).contiguous()
                if contiguous.numel():
                    writer.write(contiguous.reshape(-1).view(torch.uint8).numpy().data)
            # The content must be on the disk before the file gets its name: after a power failure a file of the right
            # size without content would be taken for a finished one.
            stream.flush()
            os.fsync(stream.fileno())
            written = True
        finally:
            writer.close(whole=written)


def _header(tensors: Sequence[TensorSpec]) -> bytes:
    """Return the beginning of a file that holds ``tensors`` in their order: a length and JSON."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for spec in tensors:
        header[spec.name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.size],
        }
        at += spec.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
