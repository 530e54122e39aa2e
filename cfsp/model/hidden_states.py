"""The hidden states between two blocks of a whole set: in memory up to a limit, what is more in a file."""

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


class Room:
    """Where hidden states are held: up to ``limit`` bytes in the CPU's memory, the rest in a file in ``folder``.

    All sets that are held at the same time share the limit.
    """

    def __init__(self, limit: int, folder: Path) -> None:
        self.limit, self.folder, self.used = limit, folder, 0

    def take(self, size: int) -> bool:
        """Whether ``size`` bytes more fit, which then count until they are given back."""
        if self.used + size > self.limit:
            return False
        self.used += size
        return True


class HiddenStates(Sequence[Tensor]):
    """A tensor [B, T, d] per batch, given out on ``device``; an assigned one takes the place of the one before.

    Without ``room`` the tensors stay where they are. The file has no name, so a killed process leaves none behind, and
    is read and written with plain calls: nothing of it counts as the process's memory.
    """

    def __init__(self, states: Iterable[Tensor] = (), *, device: torch.device, room: Room | None = None) -> None:
        self._device, self._room = device, room
        self._held: list[Tensor | _Place] = []
        self._taken = self._in_file = 0
        self._file: IO[bytes] | None = None
        for state in states:
            self.append(state)

    @property
    def in_file(self) -> int:
        """Bytes that lie in the file."""
        return self._in_file

    def like(self) -> HiddenStates:
        """An empty one that is held in the same way."""
        return HiddenStates(device=self._device, room=self._room)

    def append(self, state: Tensor) -> None:
        """
        Raises:
            RunError: the disk is full.
        """
        if self._room is None:
            self._held.append(state)
            return
        state, size = state.to("cpu").contiguous(), state.numel() * state.element_size()
        if self._room.take(size):
            self._taken += size
            self._held.append(state)
            return
        place = self._next_place(state)
        self._held.append(place)
        self._write(place, state)

    def _next_place(self, state: Tensor) -> _Place:
        size = state.numel() * state.element_size()
        place = _Place(self._in_file, size, tuple(state.shape), state.dtype)
        self._in_file += size
        return place

    def clear(self) -> None:
        """Let all go."""
        self._held.clear()
        if self._room is not None:
            self._room.used -= self._taken
        self._taken = self._in_file = 0
        self._file = None

    def __del__(self) -> None:
        self.clear()

    def shape(self, batch: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Of a batch, without reading it: [B, T, d] and the dtype."""
        held = self._held[batch]
        return tuple(held.shape), held.dtype

    def __setitem__(self, batch: int, state: Tensor) -> None:
        held = self._held[batch]
        if isinstance(held, Tensor):
            self._held[batch] = state if self._room is None else state.to("cpu").contiguous()
            return
        state = state.to("cpu").contiguous()
        if (tuple(state.shape), state.dtype) != (held.shape, held.dtype):  # a block that changes the size of its input
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
        assert self._room is not None
        try:
            if self._file is None:
                self._room.folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._room.folder, buffering=0)  # noqa: SIM115 - until it goes
            data, done = state.view(-1).view(torch.uint8).numpy().data, 0
            while done < place.size:
                done += os.pwrite(self._file.fileno(), data[done:], place.start + done)
        except OSError as error:
            raise RunError(
                f"{self._room.folder}: the hidden states of {place.start + place.size:,} bytes that memory does not "
                f"hold cannot be written there ({error.strerror}); make room, raise calibration.memory_gb or give "
                "another paths.cache_dir"
            ) from error

    def _read(self, place: _Place) -> Tensor:
        assert self._file is not None
        buffer = torch.empty(place.size, dtype=torch.uint8)
        data, done = buffer.numpy().data, 0
        while done < place.size:
            got = os.preadv(self._file.fileno(), [data[done:]], place.start + done)
            if not got:
                raise RunError("the file of the hidden states ends early; is somebody else writing to the disk?")
            done += got
        return buffer.view(place.dtype).view(place.shape)


@dataclass(frozen=True)
class _Place:
    """Where a batch lies in the file."""

    start: int
    size: int
    shape: tuple[int, ...]
    dtype: torch.dtype
