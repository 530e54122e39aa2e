"""Header of a GGUF file: metadata and the list of tensors, read within bounds.

The readers of the gguf package and of transformers trust the counts in the file: a damaged count of elements makes them
loop for minutes or take all memory, and a file that was cut is met only when its tensors are read. This reader compares
every count with the bytes that are left, and the place of every tensor with the size of the file. It skips the elements
of long arrays, so that the header of a model with a vocabulary of 150,000 tokens is read in a fraction of a second.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from cfsp.errors import CheckpointError
from cfsp.system.reading import check_regular

MAGIC = b"GGUF"
#: Value types of the format: number -> struct's letter. 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
#: Arrays of at most so many numbers are kept; longer ones, and all arrays of strings, are kept as their length.
_KEPT_ELEMENTS = 1024
#: Most keys, tensors, dimensions, and elements of an array of strings; vocabularies of today have 262,144 tokens.
_MAX_KEYS, _MAX_TENSORS, _MAX_DIMENSIONS, _MAX_STRINGS = 10_000, 200_000, 8, 4_000_000
_MAX_KEY_BYTES = 65_535
_REMEDY = "the file is damaged or was cut; fetch it again"
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


class ArrayLength(int):
    """Length of an array in the metadata whose elements are not kept.

    Attributes:
        texts: whether the elements are strings; otherwise they are numbers.
    """

    texts: bool

    def __new__(cls, count: int, *, texts: bool) -> ArrayLength:
        length = super().__new__(cls, count)
        length.texts = texts
        return length


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file.

    Attributes:
        name: its name in llama.cpp's spelling, e.g. ``blk.0.ffn_down.weight``.
        shape: its shape, rows first as in torch.
        type: its GGML type, e.g. ``Q4_1``.
    """

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def parameters(self) -> int:
        """Number of its values."""
        return prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """Header of a GGUF file.

    Attributes:
        file: the file.
        metadata: key -> value. Arrays of strings and long arrays are given by their :class:`ArrayLength`.
        tensors: the tensors, in the order of the file.
    """

    file: Path
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, e.g. ``llama``."""
        return str(self.metadata["general.architecture"])

    @property
    def quantisation(self) -> str:
        """GGML types of the weights, the one with most parameters first, e.g. ``Q4_1, Q8_0, F32``."""
        parameters: Counter[str] = Counter()
        for tensor in self.tensors:
            parameters[tensor.type] += tensor.parameters
        return ", ".join(name for name, _ in parameters.most_common())

    @property
    def parameters(self) -> int:
        """Number of values of all tensors."""
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def dtype(self) -> str:
        """The float type in which all weights are held without loss: float32 for quantised ones."""
        types = {tensor.type for tensor in self.tensors if len(tensor.shape) > 1}
        # Vectors (norms) are float32 in files of every type; float32 holds them, and they are cast only without loss.
        return {frozenset({"F16"}): "float16", frozenset({"BF16"}): "bfloat16"}.get(frozenset(types), "float32")


def is_gguf(file: Path) -> bool:
    """Return whether a path is a file with the name or the first bytes of GGUF."""
    if not file.is_file():
        return False
    if file.suffix.lower() == ".gguf":
        return True
    try:
        with file.open("rb") as stream:
            return stream.read(4) == MAGIC
    except OSError:
        return False


def read_header(file: Path, where: str) -> GgufHeader:
    """Read the header of a GGUF file; no tensor is read.

    Args:
        file: the file.
        where: name of the file in messages, e.g. ``model.path=FILE``.

    Raises:
        CheckpointError: the file is no whole GGUF file of a language model.
    """
    check_regular(file, where)
    if _SPLIT.search(file.name):
        raise CheckpointError(
            f"{where}: one part of a model that was split into several GGUF files; join them first "
            "(llama-gguf-split --merge FIRST_PART WHOLE.gguf)"
        )
    try:
        with file.open("rb") as stream:
            if stream.read(4) != MAGIC:
                raise CheckpointError(f"{where}: does not begin with GGUF, so it is no GGUF file; {_REMEDY}")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _parsed(file, content, where)
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read ({error.strerror}); see that it is readable") from error
    except (struct.error, UnicodeDecodeError, OverflowError, IndexError) as error:
        raise CheckpointError(f"{where}: its header cannot be read; {_REMEDY}") from error


def _parsed(file: Path, content: mmap.mmap, where: str) -> GgufHeader:
    version, n_tensors, n_keys = struct.unpack_from("<IQQ", content, 4)
    if version not in (2, 3):
        raise CheckpointError(f"{where}: GGUF of version {version}; versions 2 and 3 (little endian) are read")
    if n_keys > _MAX_KEYS or n_tensors > _MAX_TENSORS:
        raise CheckpointError(f"{where}: its header counts {n_keys:,} keys and {n_tensors:,} tensors; {_REMEDY}")
    cursor = _Cursor(content, 24)
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.string(_MAX_KEY_BYTES)
        if not key.isprintable():  # it would reach the terminal
            raise struct.error("a key with control characters")
        metadata[key] = cursor.value(cursor.number("I"))
    if not isinstance(metadata.get("general.architecture"), str):
        raise CheckpointError(f"{where}: names no architecture (general.architecture); it is no language model")
    entries = [cursor.tensor() for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise CheckpointError(f"{where}: general.alignment={alignment}; {_REMEDY}")
    start = -(-cursor.position // alignment) * alignment
    return GgufHeader(file, metadata, tuple(_checked(entries, len(content) - start, where)))


def _checked(entries: list[tuple[str, tuple[int, ...], int, int]], size: int, where: str) -> list[GgufTensor]:
    """Return the tensors after a check that each of them lies in the file.

    Args:
        entries: (name, shape, number of the GGML type, offset) of each tensor.
        size: bytes of the file behind the header.
        where: name of the file in messages.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    tensors: dict[str, GgufTensor] = {}
    for name, shape, number, offset in entries:
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise CheckpointError(
                f"{where}: {name} has the GGML type {number}, which the gguf package does not know; quantise the "
                "model in another type, or update the package"
            ) from error
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if prod(shape) % block or offset + prod(shape) // block * block_bytes > size:
            raise CheckpointError(f"{where}: {name} does not end within the file; {_REMEDY}")
        if not name.isprintable():
            raise struct.error("a tensor's name with control characters")
        if name in tensors:
            raise CheckpointError(f"{where}: has two tensors of the name {name}; {_REMEDY}")
        tensors[name] = GgufTensor(name, shape, kind.name)
    if not tensors:
        raise CheckpointError(f"{where}: holds no tensors (a vocabulary alone); give the model's file")
    return list(tensors.values())


@dataclass
class _Cursor:
    """Position in the bytes of a header."""

    content: mmap.mmap
    position: int

    def number(self, letter: str) -> Any:
        """Read one number of struct's type ``letter``."""
        (value,) = struct.unpack_from(f"<{letter}", self.content, self.position)
        self.position += struct.calcsize(f"<{letter}")
        return value

    def string(self, limit: int | None = None) -> str:
        """Read one string of at most ``limit`` bytes; None: of at most the bytes that are left."""
        length = self.number("Q")
        self._need(length, limit)
        text = self.content[self.position : self.position + length].decode("utf-8")
        self.position += length
        return text

    def value(self, kind: int) -> Any:
        """Read a value of a type of the format."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise struct.error(f"value type {kind}")
        element, count = self.number("I"), self.number("Q")
        if element in _SCALARS:
            letter = _SCALARS[element]
            size = count * struct.calcsize(letter)
            self._need(size)
            start, self.position = self.position, self.position + size
            if count > _KEPT_ELEMENTS:
                return ArrayLength(count, texts=False)
            return list(struct.unpack_from(f"<{count}{letter}", self.content, start))
        if element != _STRING or count > _MAX_STRINGS:
            raise struct.error(f"array of {count} elements of type {element}")
        end = len(self.content)
        unpack, content, position = struct.Struct("<Q").unpack_from, self.content, self.position
        for _ in range(count):
            start = position + 8
            position = start + unpack(content, position)[0]
            if position > end:
                raise struct.error("a string beyond the end of the file")
            content[start:position].decode("utf-8")  # the readers fail on other bytes, and do not say why
        self.position = position
        return ArrayLength(count, texts=True)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read the entry of one tensor: name, shape, GGML type and offset."""
        name, n_dimensions = self.string(_MAX_KEY_BYTES), self.number("I")
        if not 0 < n_dimensions <= _MAX_DIMENSIONS:
            raise struct.error(f"{n_dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(n_dimensions))[::-1]
        return name, shape, self.number("I"), self.number("Q")

    def _need(self, size: int, limit: int | None = None) -> None:
        remaining = len(self.content) - self.position
        if size > (remaining if limit is None else min(limit, remaining)):
            raise struct.error(f"{size} bytes, {remaining} left")
