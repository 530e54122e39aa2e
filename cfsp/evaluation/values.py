"""Checks of evaluators' settings, with a sentence each in place of pydantic's messages about types."""

from __future__ import annotations

from typing import Any


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def checked_windows(value: Any) -> tuple[int, int] | None:
    """Check the range [first, end) of the windows to evaluate; None: all of them.

    Raises:
        ValueError: the value is not such a range.
    """
    if value is None:
        return None
    if isinstance(value, list | tuple) and len(value) == 2 and _is_whole(value[0], 0) and _is_whole(value[1], 1):
        return value[0], value[1]
    missing = "; item 2 is missing" if isinstance(value, list | tuple) and len(value) == 1 else ""
    raise ValueError(f"expected [first, end], e.g. [0,24]{missing}")


def checked_batch_size(value: Any) -> int:
    """Check the number of sequences or requests at a time.

    There is no "auto", because the number changes the last digits of a figure.

    Raises:
        ValueError: the value is not a whole number from 1.
    """
    if _is_whole(value, 1):
        return value
    raise ValueError("sequences at a time: give a whole number from 1, e.g. 16")


def checked_limit(value: Any) -> int | float | None:
    """Check the limit as lm-eval takes it: a number of items of each task, or a share of them between 0 and 1.

    Raises:
        ValueError: the value is neither.
    """
    if value is None or _is_whole(value, 1) or (isinstance(value, float) and 0 < value < 1):
        return value
    raise ValueError(
        "items of a task: give a whole number from 1, a share of them between 0 and 1 (e.g. 0.05), or null for all"
    )
