"""Reading of single tensors from safetensors files with plain reads, so that no file is mapped into memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
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

#: Names in safetensors of the dtypes that a checkpoint before quantisation holds.
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
#: Bytes that are compared at a time.
_COMPARED_BYTES = 1 << 24


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers reads in ``folder``: the single file, those of the index, or all.

    Raises:
        CheckpointError: the index cannot be read.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(weight_map(folder).values()))]
    return sorted(folder.glob("*.safetensors"))


def weight_map(folder: Path) -> dict[str, str]:
    """Return the index of a sharded checkpoint: tensor name -> file name.

    Raises:
        CheckpointError: the index cannot be read, or names files outside of the folder.
    """
    index = read_json(folder / INDEX, str(folder / INDEX), limit=_MAX_HEADER_BYTES)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise CheckpointError(
            f"{folder / INDEX}: not a readable index (no weight_map of tensor and file names); fetch the model again"
        )
    for name in set(files.values()):
        # transformers would follow a path, and take another suffix for a pickle.
        if Path(name).name != name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX}: names the file {name[:100]!r}; an index names *.safetensors files that lie beside "
                "it, without a path; save the model again"
            )
    return files


def index_decides(folder: Path, headers: Mapping[Path, Iterable[str]]) -> bool:
    """Return whether the index of a sharded checkpoint differs from its files: it omits some, or lists other tensors.

    Args:
        folder: a model folder.
        headers: file -> names of its tensors, for the files that :func:`weight_files` returns.
    """
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return False
    stored = [(name, file.name) for file, names in headers.items() for name in names]
    if set(folder.glob("*.safetensors")) != headers.keys():
        return True
    return len(dict(stored)) != len(stored) or dict(stored) != weight_map(folder)


@dataclass(frozen=True)
class _Place:
    """Place of a tensor on disk.

    Attributes:
        file: the file.
        dtype: stored dtype.
        shape: shape.
        start: first byte in the file.
        size: number of bytes.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class Shards:
    """Tensors of a checkpoint folder by name. Any thread may read."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of all files.

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
        """Shape of every tensor, by name."""
        return {name: place.shape for name, place in self._places.items()}

    def equal(self, first: str, second: str) -> bool:
        """Return whether two tensors hold the same values. Tensors of one dtype are compared piece by piece."""
        place, other = self._places[first], self._places[second]
        if place.shape != other.shape:
            return False
        if place.dtype != other.dtype:
            return torch.equal(self.read(first).double(), self.read(second).double())
        for at in range(0, place.size, _COMPARED_BYTES):
            pieces = [torch.empty(min(_COMPARED_BYTES, place.size - at), dtype=torch.uint8) for _ in range(2)]
            self._read_into(first, place, pieces[0], place.start + at)
            self._read_into(second, other, pieces[1], other.start + at)
            if not torch.equal(*pieces):
                return False
        return True

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Stored dtype of every tensor, by name."""
        return {name: place.dtype for name, place in self._places.items()}

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Return ``names`` in the order in which the tensors lie on disk."""
        return sorted(names, key=lambda name: (self._places[name].file, self._places[name].start))

    def read(self, name: str) -> Tensor:
        """Return a tensor as it is stored, on the CPU.

        Raises:
            CheckpointError: names file and tensor.
        """
        place = self._places[name]
        buffer = torch.empty(place.size, dtype=torch.uint8)
        self._read_into(name, place, buffer, place.start)
        return _typed(buffer, place.dtype, place.shape)

    def read_rows(self, name: str, rows: list[int]) -> Tensor:
        """Return only the given rows of a matrix, [len(rows), ...].

        Raises:
            CheckpointError: names file and tensor.
        """
        place = self._places[name]
        size = place.size // place.shape[0]
        buffer = torch.empty(len(rows), size, dtype=torch.uint8)
        for at, row in enumerate(rows):
            self._read_into(name, place, buffer[at], place.start + row * size)
        return _typed(buffer.flatten(), place.dtype, (len(rows), *place.shape[1:]))

    def in_parts(self, name: str, most: int = 2**26) -> Iterator[Tensor]:
        """Yield a tensor in order, in flat parts of about ``most`` bytes.

        Raises:
            CheckpointError: names file and tensor.
        """
        place = self._places[name]
        step = max(most // place.dtype.itemsize, 1) * place.dtype.itemsize
        for start in range(0, place.size, step):
            buffer = torch.empty(min(step, place.size - start), dtype=torch.uint8)
            self._read_into(name, place, buffer, place.start + start)
            yield buffer.view(place.dtype)

    def close(self) -> None:
        """Close the files; a later read opens them again."""
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
                count = os.preadv(descriptor, [target[done:]], start + done)
                if not count:
                    raise CheckpointError(
                        f"{place.file}: ends within {name} ({done} of its {len(target)} bytes are there); {_REMEDY}"
                    )
                done += count
        except OSError as error:
            raise CheckpointError(f"{place.file}: {name} cannot be read ({error.strerror}); {_REMEDY}") from error


def _typed(buffer: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return buffer.view(dtype).view(shape)


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Read the header of a safetensors file, and check it against the file's size.

    A safetensors file is 8 bytes of length, JSON, and data up to the last of the ``data_offsets``, one tensor after the
    other without a gap.

    Returns:
        The entry of each tensor (dtype, shape, data_offsets) by name, and the first byte of the data.

    Raises:
        CheckpointError: the file is missing, truncated or no safetensors file, or the entry of a tensor, which is
            named, is impossible.
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
        metadata = header.pop("__metadata__", None)
        if len(header) > _MAX_TENSORS:
            count_text = f"{len(header):,} tensors, at most {_MAX_TENSORS:,} are read"
            raise CheckpointError(f"{file}: names {count_text}; {_REMEDY}")
        claimed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        wrong = _contradiction(header) or _wrong_metadata(metadata)
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
    """Return the first entry that contradicts its own shape or the entries beside it; None where all fit."""
    free = 0
    for name, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        (begin, end), dtype, shape = entry["data_offsets"], entry["dtype"], entry["shape"]
        if not all(isinstance(number, int) and number >= 0 for number in (begin, end, *shape)):
            return f"{name} has {shape} for its shape and {begin}, {end} for its place"
        if begin != free or end < begin:
            return f"{name} lies at bytes {begin} to {end} of the data where the tensor before it ends at {free}"
        # The size of a dtype that is not known here is not known either.
        needed = prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else end - begin
        if end - begin != needed:
            return f"{name} takes {end - begin} bytes where {shape} in {dtype} are {needed}"
        free = end
    return None


def _wrong_metadata(metadata: object) -> str | None:
    """Return what is wrong with ``__metadata__``, which the reader of transformers takes as text by name only."""
    if metadata is None or (isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())):
        return None
    return "__metadata__ is no group of texts"


def check_safetensors(folder: Path) -> int:
    """Check from headers and sizes alone that the weights which transformers would read here are complete.

    Returns:
        The number of tensors.

    Raises:
        CheckpointError: a file is missing, truncated or no safetensors file; it is named.
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
