"""Files of a run as its record describes them: what changed since is found, what people may edit is not."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from cfsp.record.written import damage, describe_files, within


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "model").mkdir()
    for name, text in (("plan.json", "{}"), ("model/weights", "12345"), ("model/README.md", "card")):
        (tmp_path / name).write_text(text)
    return tmp_path


def test_files_are_described_by_size_and_sha256(out):
    files = describe_files(out, ["plan.json", "model", "absent"])
    assert files.keys() == {"plan.json", "model/weights", "model/README.md"}
    assert files["model/weights"] == {"bytes": 5, "sha256": hashlib.sha256(b"12345").hexdigest()}
    assert damage(files, out, hashes=True) is None


@pytest.mark.parametrize(
    ("text", "hashes", "said"),
    [("1234", False, "4 bytes where 5 were written"), ("54321", True, "sha256 differs"), (None, False, "is missing")],
)
def test_what_changed_is_named(out, text, hashes, said):
    files = describe_files(out, ["model"])
    (out / "model" / "weights").unlink()
    if text is not None:
        (out / "model" / "weights").write_text(text)
    assert said in damage(files, out, hashes=hashes)


def test_the_card_may_be_edited_and_equal_sizes_pass_without_hashes(out):
    files = describe_files(out, ["model"])
    (out / "model" / "README.md").write_text("another card")
    (out / "model" / "weights").write_text("54321")
    assert damage(files, out) is None


def test_a_folder_in_the_place_of_a_file_and_a_wrong_entry(out):
    files = describe_files(out, ["plan.json"])
    os.unlink(out / "plan.json")
    (out / "plan.json").mkdir()
    assert damage(files, out, hashes=True) is not None
    assert "cannot be compared" in damage({"model/weights": {"size": 5}}, out)


def test_entries_within_names():
    files = {"plan.json": 1, "model/a": 2, "model-gguf/a": 3, "models": 4}
    assert within(files, ["model", "plan.json"]) == {"plan.json": 1, "model/a": 2}
    assert within(None, ["model"]) == {}
