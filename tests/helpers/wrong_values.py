"""Wrong values, every key that can be given one, and what an answer to one looks like."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf

from cfsp.system.package import config_folder

#: What no answer may hold: words of pydantic and of Python.
FOREIGN = (
    "input should be", "valid tuple", "valid integer", "valid number", "valid string", "extra inputs", "value error",
    "field required", "[type=", "unable to parse", "pydantic", "traceback", "<class", "nonetype", "object at 0x",
    "instance of", "dataclass", "greater than or equal", "omegaconf", "exceeds the limit", "typeerror", "keyerror",
)  # fmt: skip
GROUPS = ("model", "calibration", "sparsity", "importance", "allocator", "pruner", "recovery", "evaluation", "logger")
WRONG: list[Any] = [
    None, "", "word", ["a"], {"a": 1}, [], {}, -1, 0, 1.5, 10**30, -(10**30), 10**5000, math.nan, math.inf, -math.inf,
    True, False, "\x1b[31m", "x" * 5000, "a\nb", ["b"] * 5000, [[[[["deep"]]]]], 1e300,
]  # fmt: skip


def check_lines(lines: list[str]) -> None:
    assert lines
    for line in lines:
        assert len(line) < 500, line
        assert not any(ord(letter) < 32 for letter in line), line
        assert not any(part in line.lower() for part in FOREIGN), line


def _signature(values: Any, prefix: str = "") -> frozenset[str]:
    if not isinstance(values, Mapping):
        return frozenset()
    own = {f"{prefix}{key}" for key in values} | {str(values.get("_target_", ""))}
    return frozenset(own).union(*(_signature(inner, f"{prefix}{key}.") for key, inner in values.items()))


def _representatives(group: str) -> list[str]:
    """One option for each set of keys that options of a group have."""
    found: dict[frozenset[str], str] = {}
    for path in sorted((config_folder() / group).glob("*.yaml")):
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        found.setdefault(_signature(values), path.stem)
    return list(found.values())


def covering_compositions() -> list[list[str]]:
    """Overrides that together choose every representative of every group once."""
    options = {group: _representatives(group) for group in GROUPS}
    count = max(map(len, options.values()))
    return [[f"{group}={names[at % len(names)]}" for group, names in options.items()] for at in range(count)]


def keys_of(values: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        yield (*prefix, key)
        if isinstance(value, Mapping):
            yield from keys_of(value, (*prefix, key))
