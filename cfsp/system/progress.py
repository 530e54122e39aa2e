"""Progress bars for work that takes more than a few seconds; shown only on a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator
from typing import TypeVar

T = TypeVar("T")


def watched() -> bool:
    """Return whether bars are shown: stderr is a terminal, and tqdm is not disabled."""
    return sys.stderr.isatty() and os.environ.get("TQDM_DISABLE", "0") in ("", "0")


def progress(items: Collection[T], label: str, unit: str = "it") -> Iterator[T]:
    """Iterate over ``items`` with a bar on a terminal, which disappears at the end."""
    from tqdm import tqdm

    bar = tqdm(items, desc=label, unit=unit, leave=False, disable=not sys.stderr.isatty(), total=len(items))
    return iter(bar)
