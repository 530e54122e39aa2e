"""Files of texts, rows and token ids that are damaged, of another kind than their name says, or without end."""

from __future__ import annotations

import bz2
import csv
import errno
import gzip
import io
import json
import lzma
import os
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from cfsp.calibration.calibration_set import from_ids, from_text, from_tokens
from cfsp.config.sections import TextCalibration, TextSection, TokensCalibration
from cfsp.data import text_files
from cfsp.data.limits import Limits
from cfsp.data.read_errors import reading
from cfsp.data.rows import rows
from cfsp.data.text import locate_text, read_text
from cfsp.errors import CfspError, ConfigError, DataError
from cfsp.recovery.data import _read_pairs
from cfsp.sweep.experiment import read_experiment
from cfsp.system.yaml_files import check_yaml

LIMITS = Limits(vocab_size=1000, positions=None)
ROWS = [{"text": "Grüße"}, {"text": "zwei"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def _text(path: Path, **keys) -> str:
    return read_text(locate_text(TextSection(path=str(path), join="|", **keys), "calibration"))


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _zst_file(path: Path, content: bytes) -> Path:
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return path


def _csv(delimiter: str) -> bytes:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([["id", "text"], ["1", "Grüße"], ["2", "zwei"]])
    return out.getvalue().encode()


# Read


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES.encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("a.JSONL", LINES.encode()),
        ("a.jsonl.gz", gzip.compress(LINES.encode())),
        ("a.jsonl.bz2", bz2.compress(LINES.encode())),
        ("a.json.xz", lzma.compress(LINES.encode())),
        ("a.json", json.dumps(ROWS, indent=2).encode()),
        ("a.csv", _csv(",")),
        ("a.csv", b"\xef\xbb\xbf" + _csv(",")),
        ("a.tsv", _csv("\t")),
        ("a.csv.gz", gzip.compress(_csv(","))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_form_of_rows_is_read(tmp_path, name, content):
    path = _written(tmp_path / name, content)
    assert _text(path) == "Grüße|zwei"
    assert _text(path, skip_documents=1, max_documents=1) == "zwei"


def test_compressed_text_and_a_byte_order_mark(tmp_path):
    assert _text(_zst_file(tmp_path / "a.txt.zst", "Grüße\n".encode())) == "Grüße\n"
    assert _text(_written(tmp_path / "a.txt.bz2", bz2.compress(b"one"))) == "one"
    assert _text(_written(tmp_path / "a.txt", b"\xef\xbb\xbfone")) == "one"
    assert _text(_written(tmp_path / "b.txt", b"one\r\n two\r\n\r\n"), txt_rows="lines") == "one|two"


def test_saved_datasets_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])
    train.save_to_disk(tmp_path / "train")
    datasets.DatasetDict(train=train, test=train.select([1])).save_to_disk(tmp_path / "both")
    assert _text(tmp_path / "train") == "one|two"
    assert _text(tmp_path / "both", split="test") == "two"
    same = locate_text(TextSection(path=str(tmp_path / "train")), "x").identity["sha256"]
    assert locate_text(TextSection(path=str(tmp_path / "both")), "x").identity["sha256"] == same
    with pytest.raises(DataError, match="split=local.*train, test.*calibration.split=train"):
        _text(tmp_path / "both", split="local")
    state = tmp_path / "train" / "state.json"
    state.write_text(state.read_text().replace("data-00000", "../data-00000"))
    with pytest.raises(DataError, match="no Arrow files in this folder"):
        _text(tmp_path / "train")


# Refused


def _zeros(path: Path) -> Path:
    with path.open("wb") as stream:
        stream.truncate(20_000_000_000)
    return path


def _long(path: Path) -> Path:
    with path.open("wb") as stream:
        stream.write(b"a text " * 10_000)
        stream.truncate(20_000_000_000)
    return path


def _fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _bomb(path: Path) -> Path:
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for _ in range(100):
            stream.write(b"a" * 1_000_000)
    return path


def _parquet(path: Path, **columns) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def _renamed(path: Path, name: str) -> Path:
    return path.rename(path.with_name(name))


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda d: d, ["this is a folder", "give a file in it: near.txt"]),
        (lambda d: Path("/dev/zero"), ["a device"]),
        (lambda d: _fifo(d / "a.txt"), ["FIFO"]),
        (lambda d: d / ("a" * 5000), ["no such file"]),
        (lambda d: _zeros(d / "a.txt"), ["NUL bytes"]),
        (lambda d: _long(d / "a.txt"), ["20,000,000,000 bytes", "calibration.max_documents"]),
        (lambda d: _bomb(d / "a.txt.gz"), ["compressed bytes", "100 times"]),
        (lambda d: _bomb(d / "a.jsonl.gz"), ["100 times"]),
        (lambda d: _written(d / "a.txt", "Grüße".encode("utf-16")), ["UTF-16", "UTF-8"]),
        (lambda d: _written(d / "a.txt", "Grüße".encode("utf-16-le")), ["NUL bytes", "UTF-16"]),
        (lambda d: _written(d / "a.txt", "Grüße".encode("latin-1")), ["not UTF-8", "0xfc", "Latin-1"]),
        (lambda d: _written(d / "a.jsonl", '{"text": "Grüße"}'.encode("latin-1")), ["not UTF-8", "Latin-1"]),
        (lambda d: _written(d / "a.jsonl", b'{"text": null}'), ["text_field=text", "line 1", "null"]),
        (lambda d: _written(d / "a.jsonl", b'{"text": 5}'), ["line 1", "the number 5"]),
        (lambda d: _written(d / "a.jsonl", b'{"text": ["a"]}'), ["line 1", "a list"]),
        (lambda d: _written(d / "a.jsonl", b'"bare"\n'), ["line 1 is a bare string", '{"text": "..."}']),
        (lambda d: _written(d / "a.jsonl", b'["a", "b"]\n'), ["line 1 is a list"]),
        (lambda d: _written(d / "a.json", b'["a", "b"]\n'), ["row 1 is a bare string"]),
        (lambda d: _written(d / "a.jsonl", b"[" * 100_000), ["nested too deep"]),
        (lambda d: _written(d / "a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}"), ["thousands of digits"]),
        (lambda d: _written(d / "a.csv", b"id,body\n1,a\n"), ["text_field=text", "id, body"]),
        (lambda d: _written(d / "a.jsonl", gzip.compress(b"{}")), ["compressed with gzip", "a.jsonl.gz"]),
        (lambda d: _written(d / "a.txt", bz2.compress(b"a")), ["compressed with bzip2", "a.txt.bz2"]),
        (lambda d: _written(d / "a.txt.gz", b"plain"), ["not compressed with gzip", "rename"]),
        (
            lambda d: _written(d / "a.jsonl.gz", gzip.compress(gzip.compress(b"{}"))),
            ["compressed twice", "gzip"],
        ),
        (lambda d: _written(d / "a.txt.gz", gzip.compress(bz2.compress(b"a"))), ["compressed twice", "bzip2 inside"]),
        (lambda d: _written(d / "a.txt.gz", gzip.compress(os.urandom(5000))[:-900]), ["cut off"]),
        (lambda d: _renamed(_parquet(d / "a.parquet", text=["a"]), "a.txt"), ["a parquet file", ".parquet"]),
        (lambda d: _written(d / "a.parquet", b"text"), ["not a parquet file"]),
        (lambda d: _parquet(d / "a.parquet", text=[["a"]]), ["row 1", "a list"]),
        (lambda d: _written(d / "a.txt", b"%PDF-1.7"), ["a PDF"]),
        (lambda d: _written(d / "a.txt", b"PK\x03\x04"), ["ZIP"]),
    ],
)
def test_files_that_hold_no_text_are_refused(tmp_path, make, parts):
    (tmp_path / "near.txt").write_text("near")
    path = make(tmp_path)
    start = time.monotonic()
    with pytest.raises(DataError) as found:
        _text(path)
    assert time.monotonic() - start < 5
    line = str(found.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line
    for foreign in ("UnicodeDecodeError", "Traceback", "utf-8' codec", "ArrowInvalid"):
        assert foreign not in line


def test_a_text_of_twenty_gigabytes_is_read_as_far_as_it_is_needed(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' * 5000)
    monkeypatch.setattr(text_files, "MAX_TEXT_BYTES", 50_000)
    assert _text(path, max_documents=2) == "one|one"
    with pytest.raises(DataError, match="80,000 bytes, at most 50,000.*calibration.max_documents=1000"):
        _text(path)


def test_rows_of_a_parquet_file_that_unpack_to_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_TEXT_BYTES", 1_000_000)
    path = _parquet(tmp_path / "a.parquet", text=["a" * 10_000] * 1000)
    with pytest.raises(DataError, match="more than 1,000,000 bytes"):
        _text(path)
    assert len(_text(path, max_documents=2)) == 20_001


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl.gz", "a.json"])
def test_rows_for_a_recovery(tmp_path, name):
    row = {"prompt": "Ask", "response": "Answer"}
    content = {
        "a.csv": b"\xef\xbb\xbfprompt,response\nAsk,Answer\n",
        "a.jsonl.gz": gzip.compress(json.dumps(row).encode()),
        "a.json": b"\xef\xbb\xbf" + json.dumps([row]).encode(),
    }[name]
    file = locate_text(TextSection(path=str(_written(tmp_path / name, content))), "recovery.data", split=None)
    assert list(_read_pairs(file)) == [("Ask", "Answer")]


class _Letters:
    """A tokenizer of one token a letter."""

    bos_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) for letter in text]}


def test_more_windows_than_the_text_has(tmp_path):
    path = _written(tmp_path / "a.txt", b"a" * 100)
    keys = {"kind": "text", "name": "text", "path": str(path), "seq_len": 10}
    assert from_text(TextCalibration(n_samples=90, **keys), _Letters(), LIMITS, 0).input_ids.shape == (90, 10)
    with pytest.raises(DataError, match=r"calibration.n_samples=100000000: .* 90 windows of 10 tokens"):
        from_text(TextCalibration(n_samples=100_000_000, **keys), _Letters(), LIMITS, 0)


# Token ids


def _huge(path: Path) -> None:
    with path.open("wb") as stream:
        header = {"descr": "<i8", "fortran_order": False, "shape": (10**9, 10**6)}
        np.lib.format.write_array_header_1_0(stream, header)


def _header(text: str):
    def write(path: Path) -> None:
        content = text.ljust(117).encode() + b"\n"
        path.write_bytes(b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content + bytes(64))

    return write


@pytest.mark.parametrize(
    ("write", "parts"),
    [
        (lambda p: np.save(p, np.ones((2, 8), "m8[s]")), ["integers", "timedelta64"]),
        (lambda p: np.save(p, np.ones((2, 8), "M8[s]")), ["integers", "datetime64"]),
        (lambda p: np.save(p, np.ones((2, 8), bool)), ["integers", "bool"]),
        (lambda p: np.save(p, np.ones((2, 8), complex)), ["integers", "complex"]),
        (lambda p: np.save(p, np.ones((2, 8), "f2")), ["integers", "float16"]),
        (lambda p: np.save(p, np.full((2, 8), "a")), ["integers"]),
        (lambda p: np.save(p, np.zeros((2, 8), [("a", "i4"), ("b", "i4")])), ["integers", "records"]),
        (lambda p: np.save(p, np.array([[{}]]), allow_pickle=True), ["Python objects"]),
        (lambda p: np.save(p, np.ones((9, 1), np.int64)), ["rows of one token", "(9, 1)"]),
        (lambda p: np.save(p, np.ones((0, 8), np.int64)), ["[n, T]", "(0, 8)"]),
        (lambda p: np.save(p, np.ones((2, 2, 2), np.int64)), ["[n, T]", "(2, 2, 2)"]),
        (lambda p: np.save(p, np.int64(5)), ["[n, T]", "()"]),
        (_huge, ["cut off"]),
        (_header("{'descr': '<i8', 'fortran_order': False, 'shape': (-1, 8)}"), ["(-1, 8)"]),
        (_header("{'descr': '<i8', 'fortran_order': False, 'shape': " + "(" * 60), ["damaged header"]),
        (_header("{'descr': 5}"), ["damaged header"]),
        (lambda p: p.write_bytes(b"\x93NUMPY\x01"), ["damaged header"]),
        (lambda p: np.savez(p.open("wb"), a=np.ones((2, 8), int)), ["archive", ".npz"]),
        (lambda p: np.save(p, np.full((2, 8), 2**63 + 5, np.uint64)), ["vocabulary"]),
        (lambda p: os.mkfifo(p), ["FIFO"]),
        (lambda p: p.mkdir(), ["folder"]),
    ],
)
def test_invalid_token_id_files_are_refused(tmp_path, write, parts):
    path = tmp_path / "ids.npy"
    write(path)
    section = TokensCalibration(kind="tokens", name="tokens", path=str(path))
    with pytest.raises(DataError) as found:
        from_tokens(section, LIMITS, 0)
    for part in ["calibration.path", *parts]:
        assert part in str(found.value), str(found.value)


@pytest.mark.parametrize("dtype", ["<i8", ">i4", "u2", "u1", "<u8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_token_ids_of_every_integer_type_and_order(tmp_path, dtype, order):
    ids = np.arange(24).reshape(4, 6)
    np.save(tmp_path / "ids.npy", np.asarray(ids.astype(dtype), order=order))
    section = TokensCalibration(kind="tokens", name="tokens", path=str(tmp_path / "ids.npy"), n_samples=3, seq_len=5)
    found = from_tokens(section, LIMITS, 0).input_ids
    assert found.dtype == torch.int64
    assert found.tolist() == ids[:3, :5].tolist()


@pytest.mark.parametrize("ids", [torch.ones(2, 3, dtype=torch.bool), torch.ones(6, dtype=torch.int64)])
def test_token_ids_given_to_the_library(ids):
    with pytest.raises(DataError, match="integer token ids"):
        from_ids(ids, LIMITS)


# YAML


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 12)), "values"),
        ("a: " + "[" * 100_000, "nested deeper"),
        ("a: &a [*a]", "alias"),
        ("a: [1", "not a YAML file"),
        ("a: \x00", "not a YAML file"),
        ("x" * 2_000_000, "bytes"),
    ],
    ids=["bomb", "nesting", "loop", "syntax", "control", "size"],
)
def test_unsafe_yaml_files_are_refused(tmp_path, content, part):
    path = tmp_path / "a.yaml"
    path.write_text(content)
    start = time.monotonic()
    for read in (lambda: check_yaml(path, "a.yaml"), lambda: read_experiment(path)):
        with pytest.raises(CfspError, match=part):
            read()
    assert time.monotonic() - start < 5


def test_a_yaml_file_with_a_byte_order_mark(tmp_path):
    path = _written(tmp_path / "a.yaml", b"\xef\xbb\xbfa: 1\n")
    assert check_yaml(path, "a.yaml") == "a: 1\n"
    os.mkfifo(tmp_path / "b.yaml")
    with pytest.raises(ConfigError, match="FIFO"):
        check_yaml(tmp_path / "b.yaml", "b.yaml")


def test_a_configuration_folder_with_a_fifo_or_a_bomb(refused, tmp_path):
    folder = tmp_path / "mine" / "importance"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "own.yaml")
    (line,) = refused("--config-dir", str(tmp_path / "mine"), "importance=own")
    assert "importance/own.yaml" in line
    assert "FIFO" in line


def test_a_stream_named_as_a_tar_archive_is_refused(tmp_path):
    file = tmp_path / "texts.tar.gz"
    file.write_bytes(gzip.compress(b"some text of an archive without a signature\n" * 50))
    with pytest.raises(DataError, match="tar archive"):
        text_files.check_file(file, f"calibration.path={file}", forms=".txt", streamed=False, remedy="")


def test_an_array_that_would_be_parsed_as_a_whole_is_bounded(tmp_path, monkeypatch):
    file = tmp_path / "texts.json"
    file.write_text(json.dumps([{"text": "a" * 90}] * 20))
    assert len(list(rows(file, "calibration.path=texts.json"))) == 20
    monkeypatch.setattr("cfsp.data.rows.MAX_ARRAY", 1_000)
    with pytest.raises(DataError, match=r"one row a line \(\.jsonl\)"):
        list(rows(file, "calibration.path=texts.json"))


def test_a_damaged_byte_of_a_parquet_file_is_never_answered_in_the_words_of_arrow(tmp_path):
    sound = _parquet(tmp_path / "a.parquet", text=["Grüße aus dem Wald. " * 20] * 5, id=[1, 2, 3, 4, 5]).read_bytes()
    said = set()
    for at in range(4, len(sound), 7):  # the footer takes most of the file
        file = _written(tmp_path / "a.parquet", sound[:at] + b"\t" + sound[at + 1 :])
        try:
            _text(file)
        except DataError as error:
            said.add(str(error))
    assert any("its content is damaged" in line for line in said)
    for line in said:
        assert any(ours in line for ours in ("content is damaged", "more memory", "UTF-8", "no such", "holds")), line


@pytest.mark.parametrize(
    "error",
    [
        pyarrow.ArrowInvalid("Invalid number of indices: 0"),
        pyarrow.ArrowNotImplementedError("Support for codec 'x' not built"),
        pyarrow.ArrowIndexError("index out of bounds"),
        pyarrow.ArrowSerializationError("words of Arrow"),
        csv.Error("line contains NUL"),
        gzip.BadGzipFile("CRC check failed 0x1 != 0x2"),
        zlib.error("Error -3 while decompressing data: invalid block type"),
        AssertionError("words of a library"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_libraries_become_messages_of_cfsp(error):
    with pytest.raises(DataError) as found, reading("calibration.path=FILE"):
        raise error
    assert str(found.value).startswith("calibration.path=FILE: cannot be read")
    assert str(error) not in str(found.value)


def test_an_error_of_the_system_keeps_its_reason():
    with pytest.raises(DataError, match="Input/output error"), reading("calibration.path=FILE"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
