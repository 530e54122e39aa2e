"""Hidden states of all batches between two blocks, held in memory up to a limit and in a file beyond it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, overload

import torch
from torch import Tensor

from cfsp.errors import RunError


class SpillBuffer:
    """Memory limit for hidden states on the CPU, and the folder for those beyond it.

    All sets that exist at the same time share the limit.

    Attributes:
        limit: most bytes in memory.
        folder: folder of the files with hidden states beyond the limit.
        used: bytes in memory at present.
    """

    def __init__(self, limit: int, folder: Path) -> None:
        self.limit, self.folder, self.used = limit, folder, 0

    def reserve(self, size: int) -> bool:
        """Reserve ``size`` bytes of memory and return whether they fit.

        Reserved bytes count until the owner subtracts them from ``used``.
        """
        if self.used + size > self.limit:
            return False
        self.used += size
        return True


class HiddenStates(Sequence[Tensor]):
    """Hidden states [B, T, d] of each batch.

    Reading an item returns a tensor on ``device``. Without a :class:`SpillBuffer`, tensors are kept as they are. The
    file has no name, so that a killed process leaves nothing behind. It is not mapped into memory, so that it does not
    count as memory of the process.

    Args:
        states: hidden states of the first batches.
        device: device of the tensors that are returned.
        spill: memory limit; None: none.
    """

    def __init__(
        self, states: Iterable[Tensor] = (), *, device: torch.device, spill: SpillBuffer | None = None
    ) -> None:
        self._device, self._spill = device, spill
        self._held: list[Tensor | _Place] = []
        self._reserved = self._file_bytes = 0
        self._file: IO[bytes] | None = None
        for state in states:
            self.append(state)

    @property
    def bytes_in_file(self) -> int:
        """Bytes of hidden states in the file."""
        return self._file_bytes

    def empty_like(self) -> HiddenStates:
        """Return an empty set with the same device and memory limit."""
        return HiddenStates(device=self._device, spill=self._spill)

    def append(self, state: Tensor) -> None:
        """Add the next batch.

        Raises:
            RunError: the disk is full.
        """
        if self._spill is None:
            self._held.append(state)
            return
        state, size = state.to("cpu").contiguous(), state.numel() * state.element_size()
        if self._spill.reserve(size):
            self._reserved += size
            self._held.append(state)
            return
        place = self._next_place(state)
        self._held.append(place)
        self._write(place, state)

    def _next_place(self, state: Tensor) -> _Place:
        size = state.numel() * state.element_size()
        place = _Place(self._file_bytes, size, tuple(state.shape), state.dtype)
        self._file_bytes += size
        return place

    def clear(self) -> None:
        """Drop all batches and free their memory."""
        self._held.clear()
        if self._spill is not None:
            self._spill.used -= self._reserved
        self._reserved = self._file_bytes = 0
        self._file = None

    def __del__(self) -> None:
        self.clear()

    def shape(self, batch: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape [B, T, d] and the dtype of a batch without reading it."""
        held = self._held[batch]
        return tuple(held.shape), held.dtype

    def __setitem__(self, batch: int, state: Tensor) -> None:
        held = self._held[batch]
        if isinstance(held, Tensor):
            self._held[batch] = state if self._spill is None else state.to("cpu").contiguous()
            return
        state = state.to("cpu").contiguous()
        if (tuple(state.shape), state.dtype) != (held.shape, held.dtype):  # some blocks change the shape of their input
            held = self._held[batch] = self._next_place(state)
        self._write(held, state)

    @overload
    def __getitem__(self, batch: int) -> Tensor: ...

    @overload
    def __getitem__(self, batch: slice) -> list[Tensor]: ...

    def __getitem__(self, batch: int | slice) -> Tensor | list[Tensor]:
        if isinstance(batch, slice):
            return [self[at] for at in range(len(self))[batch]]
        held = self._held[batch]
        return (held if isinstance(held, Tensor) else self._read(held)).to(self._device)

    def __len__(self) -> int:
        return len(self._held)

    def _write(self, place: _Place, state: Tensor) -> None:
        assert self._spill is not None
        try:
            if self._file is None:
                self._spill.folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._spill.folder, buffering=0)  # noqa: SIM115 - open as long as the set lives
            data, done = state.view(-1).view(torch.uint8).numpy().data, 0
            while done < place.size:
                done += os.pwrite(self._file.fileno(), data[done:], place.start + done)
        except OSError as error:
            raise RunError(
                f"{self._spill.folder}: the hidden states of {place.start + place.size:,} bytes that memory does not "
                f"hold cannot be written there ({error.strerror}); make room, raise calibration.memory_gb or give "
                "another paths.cache_dir"
            ) from error

    def _read(self, place: _Place) -> Tensor:
        assert self._file is not None
        buffer = torch.empty(place.size, dtype=torch.uint8)
        data, done = buffer.numpy().data, 0
        while done < place.size:
            count = os.preadv(self._file.fileno(), [data[done:]], place.start + done)
            if not count:
                raise RunError("the file of the hidden states ends early; is somebody else writing to the disk?")
            done += count
        return buffer.view(place.dtype).view(place.shape)


@dataclass(frozen=True)
class _Place:
    """Place of a batch in the file.

    Attributes:
        start: first byte.
        size: number of bytes.
        shape: [B, T, d].
        dtype: dtype.
    """

    start: int
    size: int
    shape: tuple[int, ...]
    dtype: torch.dtype
