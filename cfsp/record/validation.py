"""Validation of run records: names, types and sizes that every reader of records may rely on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from cfsp.system.names import RULE, is_name

#: Limits of nesting and of numbers. No run exceeds them, and the code that shows a record could not cope.
_DEEPEST = 40
_LARGEST = 1e300
#: Half of a surrogate pair, which cannot be written as UTF-8.
_SURROGATE = re.compile("[\ud800-\udfff]")

Check = Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Return whether a value is a number to compute with: infinity is (a perplexity may overflow), NaN is not."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return False
    return (isinstance(value, float) and math.isinf(value)) or abs(value) < _LARGEST


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and is_number(value)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | bool) or is_number(value)


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _listed(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(check(item) for item in value)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


_NUMBER, _TEXT, _WHOLE = (_optional(check) for check in (is_number, _is_text, _is_whole))
#: Part -> key -> check of its value; a key is required where its check refuses None.
_PARTS: dict[str, dict[str, Check]] = {
    "configuration": {"seed": _is_whole},
    "identity": {"version": _is_scalar},
    "environment": {
        "git": _optional(_is_mapping), "packages": _is_mapping, "cpu": _is_text, "cores": _is_whole,
        "gpus": _listed(_is_text),
    },
    "model": {"fingerprint": _is_text, "dtype": _is_text, "name": _TEXT},
    "method": {"name": _TEXT},
}  # fmt: skip
_GIT: dict[str, Check] = {"commit": _is_text, "dirty": lambda value: isinstance(value, bool)}
#: Settings of a figure and of its detail; tables compare them by hash, so none is a list.
_SETTINGS: dict[str, Check] = {
    "seq_len": _WHOLE, "n": _WHOLE, "split": _TEXT, "num_fewshot": _WHOLE, "version": _optional(_is_scalar),
    "limit": _optional(_is_scalar), "unit": _TEXT, "task_hash": _TEXT, "device": _TEXT, "threads": _WHOLE,
}  # fmt: skip
_FIGURE: dict[str, Check] = {
    "suite": _is_text, "task": _is_text, "metric": _is_text, "value": is_number, "stderr": _NUMBER,
    "detail": _optional(_is_mapping), **_SETTINGS,
}  # fmt: skip
_STAGE: dict[str, Check] = {
    "name": _is_text, "seconds": _is_finite, "cached": lambda value: isinstance(value, bool), "saved_seconds": _NUMBER,
    "peak_bytes": _NUMBER, "peak_gpu_bytes": _NUMBER,
}  # fmt: skip
_BLOCK: dict[str, Check] = {
    "width": _is_finite, "base_width": lambda value: _is_finite(value) and value > 0, "distance": _is_mapping,
}  # fmt: skip


def find_record_problem(record: Any) -> str | None:
    """Return what a record of a success lacks or holds in another layout than runs do; None where it is whole."""
    return next(_problems(record), None)


def figure_problem(row: Any) -> str | None:
    """Return what a figure lacks that every reader of figures needs; None where it is whole."""
    return next(_find_wrong_values(row, _FIGURE, "a figure"), None)


def _problems(record: Any) -> Iterator[str]:
    yield from _find_unwritable_content(vars(record))
    if not is_name(record.run_id):
        yield f"run_id {str(record.run_id)[:60]!r}: {RULE}"
    for name, checks in _PARTS.items():
        yield from _find_wrong_values(getattr(record, name), checks, name)
    if "git" not in record.environment:
        yield "environment.git is missing"
    git = record.environment["git"]
    yield from _find_wrong_values(git, _GIT, "environment.git") if git is not None else ()
    if not all(_TEXT(version) for version in record.environment["packages"].values()):
        yield "environment.packages has a version that is not text"
    if not isinstance(record.measurements, dict) or not all(isinstance(v, list) for v in record.measurements.values()):
        yield "measurements are not lists of figures"
    for row in (row for rows in record.measurements.values() for row in rows):
        yield from _find_wrong_values(row, _FIGURE, "a figure")
        yield from _find_wrong_values(row.get("detail") or {}, _SETTINGS, "the detail of a figure")
    yield from _find_wrong_items(record.stages, _STAGE, "stages")
    yield from _find_wrong_items(record.blocks, _BLOCK, "blocks")
    for block in record.blocks:
        yield from _find_wrong_values(block["distance"], {"angular": _NUMBER}, "blocks.distance")
    for name in ("plan", "recovery", "checkpoint", "calibration", "error"):
        if not _optional(_is_mapping)(getattr(record, name)):
            yield f"{name} is not an object"
    if record.plan is not None:
        yield from _find_wrong_values(record.plan.get("achieved"), {"ratio": _is_finite}, "plan.achieved")
    if record.recovery:
        yield from _find_wrong_values(record.recovery, {"trainable_parameters": _NUMBER, "name": _TEXT}, "recovery")


def _find_wrong_items(values: Any, checks: dict[str, Check], name: str) -> Iterator[str]:
    if not isinstance(values, list):
        yield f"{name} is not a list"
        return
    for value in values:
        yield from _find_wrong_values(value, checks, name)


def _find_wrong_values(values: Any, checks: dict[str, Check], name: str) -> Iterator[str]:
    if not isinstance(values, dict):
        yield f"{name} is not an object"
        return
    for key, check in checks.items():
        if not check(values.get(key)):
            problem = "is missing" if values.get(key) is None else f"is {str(values[key])[:40]!r}"
            yield f"{name}.{key} {problem}"


def _find_unwritable_content(values: dict[str, Any]) -> Iterator[str]:
    """Yield a problem for nesting that is too deep and for texts that cannot be written, without recursion."""
    level: list[Any] = [values]
    for _ in range(_DEEPEST):
        inner = [item for part in level for item in (part.values() if isinstance(part, dict) else part)]
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            break
    else:
        yield f"it is nested more than {_DEEPEST} deep"
        return
    # One pass over the text is faster than a look at each of its thousands of parts.
    if surrogate := _SURROGATE.search(text := json.dumps(values, ensure_ascii=False)):
        yield f"{text[max(0, surrogate.start() - 20) : surrogate.start() + 20]!r} cannot be written as UTF-8"
