"""Checks of evaluators' settings, whose plain messages replace pydantic's messages about types."""

from __future__ import annotations

from typing import Any


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def validate_windows(value: Any) -> tuple[int, int] | None:
    """Check the range [first, end) of the windows to evaluate, and return it as a tuple; None: all windows.

    Raises:
        ValueError: the value is not such a range.
    """
    if value is None:
        return None
    if isinstance(value, list | tuple) and len(value) == 2 and _is_whole(value[0], 0) and _is_whole(value[1], 1):
        return value[0], value[1]
    missing = "; item 2 is missing" if isinstance(value, list | tuple) and len(value) == 1 else ""
    raise ValueError(f"expected [first, end], e.g. [0,24]{missing}")


def validate_batch_size(value: Any) -> int:
    """Check the number of sequences or requests at a time, and return it.

    There is no "auto", because the batch size changes the last digits of a figure.

    Raises:
        ValueError: the value is not a whole number from 1.
    """
    if _is_whole(value, 1):
        return value
    raise ValueError("sequences at a time: give a whole number from 1, e.g. 16")


def validate_limit(value: Any) -> int | float | None:
    """Check the limit and return it: a number of items of each task, or a share of them between 0 and 1, as in lm-eval.

    Raises:
        ValueError: the value is neither.
    """
    if value is None or _is_whole(value, 1) or (isinstance(value, float) and 0 < value < 1):
        return value
    raise ValueError(
        "items of a task: give a whole number from 1, a share of them between 0 and 1 (e.g. 0.05), or null for all"
    )
