"""Progress bars for anything over a few seconds; silent where nobody watches."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator
from typing import TypeVar

T = TypeVar("T")


def watched() -> bool:
    """Whether somebody sees the bars: a terminal, and tqdm is not switched off."""
    return sys.stderr.isatty() and os.environ.get("TQDM_DISABLE", "0") in ("", "0")


def progress(items: Collection[T], label: str, unit: str = "it") -> Iterator[T]:
    """Iterate with a bar on a terminal; it vanishes when done."""
    from tqdm import tqdm

    bar = tqdm(items, desc=label, unit=unit, leave=False, disable=not sys.stderr.isatty(), total=len(items))
    return iter(bar)
