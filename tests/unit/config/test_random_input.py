"""Random words, values and damage: an answer of ours, or a result; never another exception."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from copy import deepcopy
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from cfsp.config.compose import compose
from cfsp.config.parse import parse
from cfsp.config.run_config import RunConfig
from cfsp.config.sections import TextSection
from cfsp.data.text import locate_text, read_text
from cfsp.errors import ConfigError, DataError
from cfsp.recovery.data import _read_pairs
from cfsp.system.package import config_folder
from tests.helpers.wrong_values import GROUPS, WRONG, check_lines, covering_compositions, keys_of

OPTIONS = {group: sorted(path.stem for path in (config_folder() / group).glob("*.yaml")) for group in GROUPS}
COMPOSED: list[Any] = [
    OmegaConf.to_container(compose([*words, "paths.output_dir=out"]), resolve=True) for words in covering_compositions()
]
KEYS = sorted({".".join(key) for values in COMPOSED for key in keys_of(values)})

few = settings(
    derandomize=True, max_examples=25, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
many = settings(few, max_examples=3000)

letters = st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0x2FFF), max_size=12)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5000),
    st.integers(),
    st.floats(),
    letters,
    st.sampled_from([value for value in WRONG if value != 10**5000]),
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(letters, inner, max_size=3))
words = st.one_of(
    st.builds("{}={}".format, st.sampled_from(KEYS), letters),
    st.builds(lambda key, value: f"{key}={json.dumps(value)}"[:3000], st.sampled_from(KEYS), scalars),
    st.sampled_from(sorted(OPTIONS)).flatmap(
        lambda group: st.builds(f"{group}={{}}".format, st.sampled_from(OPTIONS[group]))
    ),
    st.builds("{}{}".format, st.sampled_from(["+", "++", "~", "", "~hydra."]), st.sampled_from(KEYS)),
    st.builds("{}={}".format, letters, letters),
    st.text(st.sampled_from("abseed.=[]{}()'\",:~+#$@! \\ä0-9"), max_size=20),
)


def _check_words(given_words: list[str]) -> None:
    try:
        assert isinstance(parse(compose(given_words)), RunConfig)
    except ConfigError as error:
        check_lines([line[:499] for line in error.problems])


@few
@given(st.lists(words, min_size=1, max_size=3))
def test_random_overrides(given_words):
    _check_words(given_words)


@pytest.mark.slow
@many
@given(st.lists(words, min_size=1, max_size=4))
def test_many_random_overrides(given_words):
    _check_words(given_words)


def _check_values(at: int, changes: list[tuple[str, Any]]) -> None:
    changed = deepcopy(COMPOSED[at % len(COMPOSED)])
    for key, value in changes:
        *path, leaf = key.split(".")
        node = changed
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node[leaf] = value
    try:
        assert isinstance(parse(changed), RunConfig)
    except ConfigError as error:
        check_lines(list(error.problems))


changes_of = st.lists(st.tuples(st.sampled_from(KEYS), values), min_size=1, max_size=3)


@settings(few, max_examples=400)
@given(st.integers(0, 50), changes_of)
def test_random_values(at, changes):
    _check_values(at, changes)


@pytest.mark.slow
@settings(few, max_examples=20_000)
@given(st.integers(0, 50), changes_of)
def test_many_random_values(at, changes):
    _check_values(at, changes)


# Texts

ROW = {"text": "Grüße aus dem Wald. " * 20, "prompt": "Ask", "response": "Answer"}
JSON = "".join(json.dumps(ROW | {"id": number}, ensure_ascii=False) + "\n" for number in range(5)).encode()
CSV = b"text,prompt,response\n" + b'"one, two",Ask,Answer\n' * 5


def _parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW] * 5), sink)
    return bytes(sink.getvalue())


SOUND = {
    "a.txt": JSON,
    "a.jsonl": JSON,
    "a.json": json.dumps([ROW]).encode(),
    "a.csv": CSV,
    "a.jsonl.gz": gzip.compress(JSON),
    "a.txt.bz2": bz2.compress(JSON),
    "a.json.xz": lzma.compress(JSON),
    "a.parquet": _parquet(),
}
damages = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert"]), st.integers(0, 10_000), st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=4,
)


def _damaged(content: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    for kind, at, some in changes:
        place = at % (len(content) + 1)
        if kind == "insert":
            content = content[:place] + some + content[place:]
        elif kind == "cut":
            content = content[:place] + content[place + 7 * len(some) :]
        else:
            content = content[:place] + some + content[place + len(some) :]
    return content


def _check_text(folder: Path, name: str, changes: list[tuple[str, int, bytes]]) -> None:
    path = folder / name
    path.write_bytes(_damaged(SOUND[name], changes))
    section = TextSection(path=str(path), txt_rows="lines")
    for read in (
        lambda: read_text(locate_text(section, "calibration")),
        lambda: list(_read_pairs(locate_text(section, "recovery.data", split=None))),
    ):
        try:
            assert isinstance(read(), str | list)
        except DataError as error:
            (line,) = error.problems
            check_lines([line])


@settings(few, max_examples=200)
@given(st.sampled_from(sorted(SOUND)), damages)
def test_random_damage_of_texts(tmp_path, name, changes):
    _check_text(tmp_path, name, changes)


@pytest.mark.slow
@settings(few, max_examples=20_000)
@given(st.sampled_from(sorted(SOUND)), damages)
def test_much_random_damage_of_texts(tmp_path, name, changes):
    _check_text(tmp_path, name, changes)
