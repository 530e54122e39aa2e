"""Progress bars for anything over a few seconds; silent where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(items: Collection[T], label: str, unit: str = "it") -> Iterator[T]:
    """Iterate with a bar on a terminal; it vanishes when done."""
    from tqdm import tqdm

    bar = tqdm(items, desc=label, unit=unit, leave=False, disable=not sys.stderr.isatty(), total=len(items))
    return iter(bar)
