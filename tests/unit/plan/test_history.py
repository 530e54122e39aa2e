"""The marker of a model folder: a damaged one is refused by what it holds and what is expected."""

from __future__ import annotations

from pathlib import Path

import pytest

from cfsp.errors import CheckpointError
from cfsp.plan.history import MARKER, read_marker


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", r"expected a JSON object, .* it holds \[\]"),
        ("null", "expected a JSON object, .* it holds null"),
        ('"x"', 'expected a JSON object, .* it holds "x"'),
        ('{"state": 5}', "state: expected a text; it is 5"),
        ('{"plan_sha256": null}', "plan_sha256: expected a sha256; it is null"),
        ('{"weights_sha256": []}', r"weights_sha256: expected an object .* it is \[\]"),
        ('{"weights_sha256": "' + "x" * 5000 + '"}', "weights_sha256: expected an object"),
    ],
)
def test_a_damaged_marker_is_refused_by_what_it_holds(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / MARKER).write_text(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        read_marker(tmp_path)
    assert len(str(caught.value)) < 500
    assert "remove it" in str(caught.value)


@pytest.mark.parametrize("content", ["{}", '{"state": "pruned", "plan_sha256": "0"}', '{"weights_sha256": {"a": "0"}}'])
def test_a_marker_without_digests_is_one_of_an_earlier_version(tmp_path: Path, content: str) -> None:
    (tmp_path / MARKER).write_text(content)
    assert read_marker(tmp_path) is not None
