"""The marker of a model folder: a damaged one is refused by what it holds and what is expected."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cfsp.checkpoint.save import check_destination
from cfsp.errors import CheckpointError
from cfsp.plan.history import MARKER, is_written_by_cfsp, read_marker, read_plan_history
from cfsp.weights.source import folder_fingerprint
from tests.conftest import mentions, save_with_tokenizer
from tests.helpers.tiny import tiny_model


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", r"expected a JSON object, .* it holds \[\]"),
        ("null", "expected a JSON object, .* it holds null"),
        ('"x"', 'expected a JSON object, .* it holds "x"'),
        ("{}", "schema: expected a whole number; it is null"),
        ('{"name": "another program"}', "schema: expected a whole number; it is null"),
        ('{"schema": true}', "schema: expected a whole number; it is true"),
        ('{"schema": 1, "state": 5}', "state: expected a text; it is 5"),
        ('{"schema": 1, "plan_sha256": null}', "plan_sha256: expected a sha256; it is null"),
        ('{"schema": 1, "weights_sha256": []}', r"weights_sha256: expected an object .* it is \[\]"),
        ('{"schema": 1, "weights_sha256": "' + "x" * 5000 + '"}', "weights_sha256: expected an object"),
    ],
)
def test_a_damaged_marker_is_refused_by_what_it_holds(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / MARKER).write_text(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        read_marker(tmp_path)
    assert len(str(caught.value)) < 500
    assert "remove it" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        '{"schema": 1}',
        '{"schema": 1, "state": "pruned", "plan_sha256": "0"}',
        '{"schema": 1, "weights_sha256": {"a": "0"}}',
    ],
)
def test_a_marker_without_digests_is_one_of_an_earlier_version(tmp_path: Path, content: str) -> None:
    (tmp_path / MARKER).write_text(content)
    assert read_marker(tmp_path) is not None


@pytest.mark.parametrize("content", ["null", '"x"', "[", "{}", '{"name": "another program"}'])
def test_a_foreign_file_of_the_markers_name_makes_no_folder_of_cfsp(tmp_path: Path, content: str) -> None:
    """Nothing in the folder may be replaced, its code counts, and no plan is read of it, with or without plan.json."""
    (tmp_path / "notes.txt").touch()
    (tmp_path / MARKER).write_text(content)
    assert not is_written_by_cfsp(tmp_path)
    with pytest.raises(CheckpointError, match="was not written by cfsp"):
        check_destination(tmp_path)
    with pytest.raises(CheckpointError, match=MARKER):
        read_plan_history(tmp_path)
    (tmp_path / MARKER).write_text('{"schema": 1}')
    check_destination(tmp_path)
    assert read_plan_history(tmp_path) is None


def test_the_code_beside_a_foreign_file_of_the_markers_name_counts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / MARKER).write_text('{"name": "another program"}')
    fingerprints = set()
    for code in ("a = 1", "a = 2"):
        (tmp_path / "modeling_own.py").write_text(code)
        fingerprints.add(folder_fingerprint(tmp_path))
    assert len(fingerprints) == 2


@pytest.mark.parametrize("command", ["inspect", "verify", "export"])
def test_every_command_refuses_a_damaged_marker_without_a_plan(run_cfsp, tmp_path: Path, command: str) -> None:
    folder = save_with_tokenizer(tiny_model(), tmp_path / "model")
    (folder / MARKER).write_text("null")
    words = [command, f"path={folder}", *(["format=padded"] if command == "export" else [])]
    code, _, err = run_cfsp(*words, defaults=False)
    assert code == 2
    mentions(err.splitlines(), MARKER, "not a marker that cfsp wrote", "it holds null")
