"""Reading tensors out of a folder's safetensors files one by one, with plain reads: no file is mapped into memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfsp.errors import CheckpointError
from cfsp.system.reading import check_regular, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

#: safetensors' names of what a checkpoint before quantisation holds.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_REMEDY = "fetch or save the model again"
#: Largest header, as in the safetensors library.
_MAX_HEADER_BYTES = 100_000_000
#: Most tensors of one file; models of 60 layers with 256 experts have 50,000 in all their files.
_MAX_TENSORS = 200_000
#: Tensors are compared so many bytes at a time.
_COMPARED_BYTES = 1 << 24


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads in ``folder``: the single one, those of the index, or all.

    Raises:
        CheckpointError: an index that cannot be read.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(weight_map(folder).values()))]
    return sorted(folder.glob("*.safetensors"))


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, as the index of a sharded checkpoint says.

    Raises:
        CheckpointError: it cannot be read.
    """
    index = read_json(folder / INDEX, str(folder / INDEX), limit=_MAX_HEADER_BYTES)
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError(
            f"{folder / INDEX}: not a readable index (no weight_map of tensor and file names); fetch the model again"
        )
    for name in set(found.values()):
        # transformers would follow a path, and take another suffix for a pickle.
        if Path(name).name != name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX}: names the file {name[:100]!r}; an index names *.safetensors files that lie beside "
                "it, without a path; save the model again"
            )
    return found


def index_decides(folder: Path, headers: Mapping[Path, Iterable[str]]) -> bool:
    """Whether the index of a sharded checkpoint says more than its files: it leaves some out, or lists other tensors.

    Args:
        headers: file -> names of its tensors, of the files that :func:`weight_files` gives.
    """
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return False
    stored = [(name, file.name) for file, names in headers.items() for name in names]
    if set(folder.glob("*.safetensors")) != headers.keys():
        return True
    return len(dict(stored)) != len(stored) or dict(stored) != weight_map(folder)


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: its file, dtype, shape, first byte and number of bytes."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class Shards:
    """The tensors of a checkpoint folder by name. Any thread may read."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            CheckpointError: a file is missing, truncated or no safetensors file, or holds a dtype that is not known.
        """
        self.folder = folder
        self._places: dict[str, _Place] = {}
        self._open: dict[Path, int] = {}
        for file in weight_files(folder):
            header, start = read_header(file)
            for name, entry in header.items():
                if entry["dtype"] not in DTYPES:
                    raise CheckpointError(f"{file}: {name} is {entry['dtype']}, which cannot be pruned; {_REMEDY}")
                begin, end = entry["data_offsets"]
                self._places[name] = _Place(
                    file, DTYPES[entry["dtype"]], tuple(entry["shape"]), start + begin, end - begin
                )

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor, by name."""
        return {name: place.shape for name, place in self._places.items()}

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same values; of one dtype, they are compared piece by piece."""
        one, other = self._places[first], self._places[second]
        if one.shape != other.shape:
            return False
        if one.dtype != other.dtype:
            return torch.equal(self.read(first).double(), self.read(second).double())
        for at in range(0, one.size, _COMPARED_BYTES):
            pieces = [torch.empty(min(_COMPARED_BYTES, one.size - at), dtype=torch.uint8) for _ in range(2)]
            self._read_into(first, one, pieces[0], one.start + at)
            self._read_into(second, other, pieces[1], other.start + at)
            if not torch.equal(*pieces):
                return False
        return True

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Stored dtype of every tensor, by name."""
        return {name: place.dtype for name, place in self._places.items()}

    def in_order(self, names: Iterable[str]) -> list[str]:
        """``names`` in the order in which they lie on disk."""
        return sorted(names, key=lambda name: (self._places[name].file, self._places[name].start))

    def read(self, name: str) -> Tensor:
        """The tensor as it is stored, on the CPU.

        Raises:
            CheckpointError: names file and tensor.
        """
        place = self._places[name]
        buffer = torch.empty(place.size, dtype=torch.uint8)
        self._read_into(name, place, buffer, place.start)
        return _typed(buffer, place.dtype, place.shape)

    def read_rows(self, name: str, rows: list[int]) -> Tensor:
        """The given rows of a matrix alone, [len(rows), ...].

        Raises:
            CheckpointError: names file and tensor.
        """
        place = self._places[name]
        size = place.size // place.shape[0]
        buffer = torch.empty(len(rows), size, dtype=torch.uint8)
        for at, row in enumerate(rows):
            self._read_into(name, place, buffer[at], place.start + row * size)
        return _typed(buffer.flatten(), place.dtype, (len(rows), *place.shape[1:]))

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def _read_into(self, name: str, place: _Place, buffer: Tensor, start: int) -> None:
        target = buffer.numpy().data
        done = 0
        try:
            descriptor = self._open.get(place.file)
            if descriptor is None:
                # setdefault: should two threads open it at once, one of the two descriptors is kept and both are fine.
                descriptor = self._open.setdefault(place.file, os.open(place.file, os.O_RDONLY))
            while done < len(target):
                got = os.preadv(descriptor, [target[done:]], start + done)
                if not got:
                    raise CheckpointError(
                        f"{place.file}: ends within {name} ({done} of its {len(target)} bytes are there); {_REMEDY}"
                    )
                done += got
        except OSError as error:
            raise CheckpointError(f"{place.file}: {name} cannot be read ({error.strerror}); {_REMEDY}") from error


def _typed(buffer: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return buffer.view(dtype).view(shape)


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """(name -> dtype, shape, data_offsets; where the data start), checked against the file's size and in itself.

    A safetensors file is 8 bytes of length, JSON, and data up to the last of the ``data_offsets``, one tensor after the
    other without a gap.

    Raises:
        CheckpointError: missing, truncated, or no safetensors file; a tensor that is not where or what it is said to
            be, by name.
    """
    if file.exists():  # else the message below
        check_regular(file, str(file))
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            if start == b"version ":
                raise CheckpointError(f"{file}: is a Git LFS pointer, not the weights; run `git lfs pull`")
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size - 8:
                raise CheckpointError(f"{file}: truncated or no safetensors file ({size} bytes); {_REMEDY}")
            if length > _MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file}: its header has {length:,} bytes, at most {_MAX_HEADER_BYTES:,} are read; {_REMEDY}"
                )
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        if len(header) > _MAX_TENSORS:
            said = f"{len(header):,} tensors, at most {_MAX_TENSORS:,} are read"
            raise CheckpointError(f"{file}: names {said}; {_REMEDY}")
        claimed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        wrong = _contradiction(header)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: is missing; {_REMEDY}") from error
    except (OSError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is nested too deep"
        raise CheckpointError(f"{file}: its header cannot be read ({reason}); {_REMEDY}") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: its header cannot be read (it does not name dtype, shape and place of each tensor as safetensors "
            f"does); {_REMEDY}"
        ) from error
    if claimed != size:
        raise CheckpointError(f"{file}: {size} bytes where its header says {claimed}: truncated; {_REMEDY}")
    if wrong is not None:
        raise CheckpointError(f"{file}: {wrong}: its header contradicts itself; {_REMEDY}")
    return header, 8 + length


def _contradiction(header: dict[str, Any]) -> str | None:
    """What a tensor's entry says that its shape or the entries beside it rule out; None where all fits together."""
    free = 0
    for name, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        (begin, end), dtype, shape = entry["data_offsets"], entry["dtype"], entry["shape"]
        if not all(isinstance(number, int) and number >= 0 for number in (begin, end, *shape)):
            return f"{name} has {shape} for its shape and {begin}, {end} for its place"
        if begin != free or end < begin:
            return f"{name} lies at bytes {begin} to {end} of the data where the tensor before it ends at {free}"
        # Of a dtype that is not known here the size is not known either.
        needed = prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else end - begin
        if end - begin != needed:
            return f"{name} takes {end - begin} bytes where {shape} in {dtype} are {needed}"
        free = end
    return None


def check_safetensors(folder: Path) -> int:
    """See from headers and sizes alone that the weights transformers would read here are complete.

    Returns:
        The number of tensors.

    Raises:
        CheckpointError: names the file that is missing, truncated or no safetensors file.
    """
    folder = Path(folder)
    files = weight_files(folder)
    if not files:
        raise CheckpointError(f"{folder}: there is no safetensors file; fetch or save the model again")
    expected = {} if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file() else weight_map(folder)
    tensors = 0
    for file in files:
        header, _ = read_header(file)
        tensors += len(header)
        lost = [weight for weight, name in expected.items() if name == file.name and weight not in header]
        if lost:
            raise CheckpointError(f"{file}: lacks {lost[0]}, which {INDEX} expects there; fetch the model again")
    return tensors


MARKER = "cfsp_checkpoint.json"
