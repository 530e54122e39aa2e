"""Silence for transformers while it reads files, and its errors in one line."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

from cfsp.errors import printable


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of transformers and its bars, which are also drawn where nobody watches."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)


def line_of(error: Exception) -> str:
    """Return the line of an error that says what is wrong; "Validation error for field ...:" does not."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(next((line for line in lines if not line.endswith(":")), type(error).__name__))[:200]
