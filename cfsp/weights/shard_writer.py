"""Writing safetensors files tensor by tensor: what is written is never in memory as a whole."""

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
from cfsp.weights.shards import DTYPES, INDEX, WEIGHTS

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Outgoing:
    """A tensor of a checkpoint to be written: its name, shape and the dtype it is stored in."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize


def write_shards(
    folder: Path,
    tensors: Sequence[Outgoing],
    values: Callable[[list[str]], Iterator[tuple[str, Tensor]]],
    limit: int,
) -> int:
    """Write ``tensors`` to as many files of at most ``limit`` bytes as they need, with an index if there are several.

    A file that is there already, as whole as it is to be, is kept: a run that was stopped had finished it. Returns the
    bytes of all files.

    Args:
        values: gives (name, tensor) for the names asked for, in their order.
    """
    shards = list(_shards(tensors, limit))
    names = [
        WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    missing = {name: shard for name, shard in zip(names, shards, strict=True) if not _holds(folder / name, shard)}
    source = values([outgoing.name for shard in missing.values() for outgoing in shard])
    for name, shard in missing.items():
        write_file(folder / f"{name}.partial", shard, source, True)
        (folder / f"{name}.partial").rename(folder / name)
    if len(shards) > 1:
        by_file = {outgoing.name: name for name, shard in zip(names, shards, strict=True) for outgoing in shard}
        index = {"metadata": {"total_size": sum(outgoing.size for outgoing in tensors)}, "weight_map": by_file}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _shards(tensors: Sequence[Outgoing], limit: int) -> Iterator[list[Outgoing]]:
    shard: list[Outgoing] = []
    for outgoing in tensors:
        if shard and sum(other.size for other in shard) + outgoing.size > limit:
            yield shard
            shard = []
        shard.append(outgoing)
    yield shard


def _holds(file: Path, tensors: Sequence[Outgoing]) -> bool:
    """Whether ``file`` is there with the header that ``tensors`` get, and with as many bytes as they take."""
    header = _header(tensors)
    try:
        with file.open("rb") as stream:
            found = stream.read(len(header))
            return found == header and os.fstat(stream.fileno()).st_size == len(header) + sum(
                outgoing.size for outgoing in tensors
            )
    except OSError:
        return False


def write_file(
    file: Path, tensors: Sequence[Outgoing], source: Iterator[tuple[str, Tensor]], hashed: bool = False
) -> None:
    """Write ``tensors`` to ``file``, taking as many from ``source``, which gives them in the same order.

    Args:
        hashed: compute the file's sha256 on the way, for :func:`cfsp.system.background_hash.sha256_of`.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    with naming(file), file.open("wb") as stream:
        writer = HashingWriter(stream, hashed=hashed)
        written = False
        try:
            writer.write(_header(tensors))
            for outgoing in tensors:
                name, tensor = next(source)
                assert (name, tuple(tensor.shape)) == (outgoing.name, outgoing.shape)
                whole = tensor.detach().to(device="cpu", dtype=outgoing.dtype).contiguous()
                if whole.numel():
                    writer.write(whole.reshape(-1).view(torch.uint8).numpy().data)
            # On the disk before it gets its name: a machine that goes down must not leave a file of the right size
            # without its content, which would be taken for a finished one.
            stream.flush()
            os.fsync(stream.fileno())
            written = True
        finally:
            writer.close(whole=written)


def _header(tensors: Sequence[Outgoing]) -> bytes:
    """The beginning of a file that holds ``tensors`` in their order: a length and JSON."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for outgoing in tensors:
        header[outgoing.name] = {
            "dtype": _NAMES[outgoing.dtype],
            "shape": list(outgoing.shape),
            "data_offsets": [at, at + outgoing.size],
        }
        at += outgoing.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
