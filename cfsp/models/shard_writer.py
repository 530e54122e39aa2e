"""Writing a safetensors file tensor by tensor: what is written is never in memory as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from cfsp.models.shards import DTYPES

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


def write_file(file: Path, tensors: Sequence[Outgoing], source: Iterator[tuple[str, Tensor]]) -> None:
    """Write ``tensors`` to ``file``, taking as many from ``source``, which gives them in the same order.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
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
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for outgoing in tensors:
            name, tensor = next(source)
            assert (name, tuple(tensor.shape)) == (outgoing.name, outgoing.shape)
            whole = tensor.detach().to(device="cpu", dtype=outgoing.dtype).contiguous()
            if whole.numel():
                stream.write(whole.reshape(-1).view(torch.uint8).numpy().data)
