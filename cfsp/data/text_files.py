"""Untrusted text files: recognising and checking them, and opening them with bounded memory.

The name of a file states its form: ``.txt``, ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet``. All but the
last may be compressed: ``.gz``, ``.bz2``, ``.xz`` or ``.zst``. The first bytes must agree with the name. A folder must
be a dataset that ``datasets.save_to_disk`` wrote. Everything else is refused with a remedy for its cause.
:mod:`cfsp.data.rows` reads the rows of these files.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

from cfsp.data.read_errors import reading
from cfsp.errors import DataError
from cfsp.system.digest import file_digest
from cfsp.system.reading import check_regular, read_json

Form = Literal["parquet", "json", "txt", "csv", "tsv", "dataset"]

#: Most bytes of text that are read into memory, after decompression.
MAX_TEXT_BYTES = 1_000_000_000
#: Most characters of a line in a file of rows.
MAX_LINE = 64_000_000
#: Decompressed content of more than MAX_FREE_BYTES may be at most MAX_RATIO times as large as the file.
MAX_RATIO, MAX_FREE_BYTES = 100, 64_000_000
#: Bytes at the start of a file by which its form is recognised.
_HEAD = 65_536

_COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_ENDINGS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "tsv"}
#: First bytes of files without text -> their form.
_OTHERS = {
    b"PK\x03\x04": "a ZIP archive (.zip, .docx, .xlsx, .npz)",
    b"%PDF": "a PDF",
    b"\x93NUMPY": "a .npy array; token ids go with calibration=tokens",
    b"ARROW1": "an Arrow file; save it as .parquet or .jsonl",
    b"\xff\xff\xff\xff": "an Arrow stream; give the folder that datasets.save_to_disk wrote",
    b"SQLite format 3": "a database",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"\x7fELF": "a program",
    b"\x89HDF": "an HDF5 file",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
}
_UTF_16 = {b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def file_form(path: Path) -> Form:
    """Return the form of a file by its name, ignoring the ending of a compression."""
    if os.path.isdir(path):
        return "dataset"
    name = path.name.lower()
    for ending in _COMPRESSIONS:
        name = name.removesuffix(ending)
    form: Any = _ENDINGS.get(f".{name.rpartition('.')[2]}" if "." in name else "", "txt")
    return form


def locate_dataset(folder: Path, split: str | None, label: str, forms: str) -> Path:
    """Return the folder of one split of a dataset that ``datasets.save_to_disk`` wrote.

    Args:
        folder: folder that was given instead of a file.
        split: split of a ``DatasetDict``; None: its only split.
        label: how messages name the folder.
        forms: names of the files that can be read, for messages.

    Raises:
        DataError: the folder is no saved dataset (the message lists the files in it), or it has no such split.
    """
    if (folder / "state.json").is_file():
        return folder
    if not (folder / "dataset_dict.json").is_file():
        raise DataError(f"{label}: this is a folder; {_files_to_choose(folder, forms)}")
    listing = read_json(folder / "dataset_dict.json", f"{label}: dataset_dict.json", limit=1_000_000, error=DataError)
    splits = listing.get("splits") if isinstance(listing, dict) else None
    if not isinstance(splits, list) or not splits or not all(_is_plain(name) for name in splits):
        raise DataError(f"{label}: dataset_dict.json names no splits; save the dataset again")
    chosen = split if split in splits else splits[0] if split is None and len(splits) == 1 else None
    if chosen is None:
        key = label.partition("=")[0].removesuffix(".path")
        way_out = f"{label}/{splits[0]}" if split is None else f"{key}.split={splits[0]}"
        prefix = "" if split is None else f"{key}.split={split}: "
        raise DataError(f"{prefix}{label} holds the splits {listed(splits)}; choose one, e.g. {way_out}")
    if not (folder / chosen / "state.json").is_file():
        raise DataError(f"{label}: the split {chosen} has no state.json; save the dataset again")
    return folder / chosen


def dataset_digest(folder: Path, label: str) -> str:
    """Return the sha256 over the digests of the Arrow files of a saved dataset, in their order."""
    digest = hashlib.sha256()
    for file in arrow_files(folder, label):
        digest.update(file_digest(file).encode())
    return digest.hexdigest()


def check_file(path: Path, label: str, *, forms: str, streamed: bool, remedy: str) -> None:
    """Refuse a file that cannot be read, before its content is hashed.

    Args:
        path: file, or folder of a saved dataset.
        label: how messages name the file, e.g. ``calibration.path=FILE``.
        forms: names of the files that can be read, for messages.
        streamed: whether only the first rows are read, so that the size of the file does not matter.
        remedy: what to do if the file is too large, with the key that does it.

    Raises:
        DataError: the file does not exist, is not regular, empty, too large or of another form than its name says.
    """
    if os.path.isdir(path):
        sizes = [file.stat().st_size for file in arrow_files(path, label)]
        if sum(sizes) > MAX_TEXT_BYTES and not streamed:
            raise DataError(_too_large(label, sum(sizes), remedy))
        return
    if not os.path.lexists(path):
        raise DataError(f"{label}: no such file; give a {forms} file")
    check_regular(path, label, error=DataError)
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{label}: the file is empty; give one that holds text")
    _check_head(path, label)
    if size > MAX_TEXT_BYTES and not streamed:
        raise DataError(_too_large(label, size, remedy))


@contextmanager
def open_text(path: Path, label: str, *, newline: str | None = None) -> Iterator[IO[str]]:
    """Open a text file, decompressed and without its byte order mark.

    Args:
        path: the file.
        label: how messages name it.
        newline: as for :func:`open`.

    Raises:
        DataError: reading gives more than MAX_TEXT_BYTES, or far more than the compressed file can hold.
    """
    with _open_binary(path) as stream:
        raw = _Bounded(stream, label, path.stat().st_size if _compression(path) else None)
        with io.TextIOWrapper(io.BufferedReader(raw, 1 << 20), encoding="utf-8-sig", newline=newline) as text:
            yield text


def lines(path: Path, label: str) -> Iterator[str]:
    """Yield the lines of a text file, each with its newline.

    Raises:
        DataError: a line has more than MAX_LINE characters.
    """
    with open_text(path, label) as stream:
        number = 0
        while line := stream.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise DataError(f"{label}: line {number} has more than {MAX_LINE:,} characters; is it a file of lines?")
            yield line


def most_row_bytes(path: Path) -> int:
    """Return the most bytes in memory that the rows of a parquet file or a saved dataset may take."""
    if file_form(path) == "dataset":
        return MAX_TEXT_BYTES
    return min(MAX_TEXT_BYTES, max(MAX_FREE_BYTES, MAX_RATIO * path.stat().st_size))


def arrow_files(folder: Path, label: str) -> list[Path]:
    """Return the Arrow files of a saved dataset; all of them lie in its folder."""
    state = read_json(folder / "state.json", f"{label}: state.json", limit=10_000_000, error=DataError)
    named = state.get("_data_files") if isinstance(state, dict) else None
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in named or []]
    if not names or not all(_is_plain(name) for name in names):
        raise DataError(f"{label}: state.json names no Arrow files in this folder; save the dataset again")
    if state.get("_indices_data_files"):
        raise DataError(f"{label}: its rows stand in another order than its files; save flatten_indices() of it")
    files = [folder / str(name) for name in names]
    for file in files:
        check_regular(file, f"{label}: {file.name}", error=DataError)
    return files


def _is_plain(name: Any) -> bool:
    """Return whether a name is the name of a file in the folder itself, without a path."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _compression(path: Path) -> str | None:
    return _COMPRESSIONS.get(path.suffix.lower())


def _open_binary(path: Path) -> Any:
    compression = _compression(path)
    if compression == "gzip":
        return gzip.open(path, "rb")
    if compression == "bzip2":
        return bz2.open(path, "rb")
    if compression == "xz":
        return lzma.open(path, "rb")
    if compression == "zstd":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return path.open("rb")


def _check_head(path: Path, label: str) -> None:
    """Refuse a file whose first bytes do not agree with its name."""
    with path.open("rb") as stream:
        head = stream.read(_HEAD)
    named = _compression(path)
    packed = next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)
    if named is not None and packed != named:
        raise DataError(
            f"{label}: cannot be read: its name ends in {path.suffix}, but it is not compressed with {named}; rename it"
        )
    if named is None and packed is not None:
        ending = next(ending for ending, name in _COMPRESSIONS.items() if name == packed)
        raise DataError(f"{label}: cannot be read: it is compressed with {packed}; rename it to {path.name}{ending}")
    if named is not None:
        with reading(label), _open_binary(path) as stream:
            head = stream.read(_HEAD)
        if not head:
            raise DataError(f"{label}: the file is empty; give one that holds text")
        again = next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)
        if again is not None:
            raise DataError(f"{label}: cannot be read: it is compressed twice ({again} inside); decompress it once")
    is_parquet = head.startswith(b"PAR1")
    if file_form(path) == "parquet":
        if named is not None:
            raise DataError(f"{label}: cannot be read: a compressed parquet file; decompress it")
        if not is_parquet:
            raise DataError(f"{label}: cannot be read: its name ends in .parquet, but it is not a parquet file")
        return
    if is_parquet:
        raise DataError(f"{label}: cannot be read: it is a parquet file; rename it to end in .parquet")
    other = next((kind for magic, kind in _OTHERS.items() if head.startswith(magic)), None)
    other = "a tar archive" if head[257:262] == b"ustar" or _is_tar_name(path) else other
    if other is not None:
        raise DataError(f"{label}: cannot be read: it is {other}; give a file of text")
    wide = next((name for magic, name in _UTF_16.items() if head.startswith(magic)), None)
    if wide is not None:
        raise DataError(
            f"{label}: cannot be read: it is {wide}; save it as UTF-8, e.g. iconv -f {wide} -t UTF-8 FILE > NEW"
        )
    if b"\0" in head:
        raise DataError(
            f"{label}: cannot be read: it holds NUL bytes, so it is a binary file or UTF-16; give text in UTF-8"
        )


def _is_tar_name(path: Path) -> bool:
    """Return whether a file is named as a tar archive; one of an old version has no signature."""
    return bool(re.search(r"\.(tar(\.\w+)?|tgz|tbz|txz)$", path.name.lower()))


def _too_large(label: str, size: int, remedy: str) -> str:
    return f"{label}: it has {size:,} bytes, at most {MAX_TEXT_BYTES:,} are read into memory; {remedy}"


def _files_to_choose(folder: Path, forms: str) -> str:
    """Return a clause about the files in a folder that could have been meant."""
    texts = []
    for file in islice(folder.rglob("*"), 2_000):
        name = file.name.lower()
        for ending in _COMPRESSIONS:
            name = name.removesuffix(ending)
        if name.endswith((".txt", *_ENDINGS)) and name not in ("config.json", "tokenizer.json", "dataset_info.json"):
            texts.append(str(file.relative_to(folder)))
    if not texts:
        return f"none of its files is a {forms} file, and it is no dataset that save_to_disk wrote; give a file"
    return f"give a file in it: {listed(sorted(texts))}"


def listed(names: Iterable[Any], most: int = 8) -> str:
    """Join the first names for a message."""
    shown = [str(name)[:60] for name in islice(names, most + 1)]
    return ", ".join(shown[:most]) + (", ..." if len(shown) > most else "") if shown else "nothing"


class _Bounded(io.RawIOBase):
    """Stream that raises a DataError when it gives more bytes than may be read."""

    def __init__(self, stream: Any, label: str, size: int | None) -> None:
        """Wrap a stream.

        Args:
            stream: binary stream of the content.
            label: how messages name the file.
            size: bytes of the compressed file; None if it is not compressed.
        """
        self._stream, self._label, self._size, self._bytes_read = stream, label, size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(min(len(buffer), 1 << 20))
        buffer[: len(content)] = content
        self._bytes_read += len(content)
        if self._size is not None and self._bytes_read > max(MAX_FREE_BYTES, MAX_RATIO * self._size):
            raise DataError(
                f"{self._label}: {self._size:,} compressed bytes stand for more than {MAX_RATIO} times as many; "
                "no text is like that"
            )
        if self._bytes_read > MAX_TEXT_BYTES:
            raise DataError(f"{self._label}: more than {MAX_TEXT_BYTES:,} bytes of text; give a smaller file")
        return len(content)
