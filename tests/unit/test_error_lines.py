"""Lines of errors in plain words, whatever a library put into them."""

from __future__ import annotations

import pytest

from cfsp.errors import CheckpointError, ConfigError


@pytest.mark.parametrize("error", [CheckpointError, ConfigError])
@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("the value of k is 5 (<class 'int'>)", "the value of k is 5 (a whole number)"),
        ("it must be <class 'str'>, not <class 'NoneType'>", "it must be a text, not null"),
        ("got <class 'torch.nn.modules.linear.Linear'>", "got Linear"),
        ("got <tokenizers.AddedToken object at 0x7f00ab12cd>", "got AddedToken"),
        ("'NoneType' object is not iterable", "null is not iterable"),
        ("a text of <b>classes</b> stays", "a text of <b>classes</b> stays"),
    ],
)
def test_types_and_addresses_become_words(error, said, shown):
    assert error(said).problems == (shown,)
