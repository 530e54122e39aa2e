"""Checks of command-line overrides before Hydra parses them.

Hydra's parser is recursive and takes seconds for a few kilobytes. It expands ranges in memory, and it merges a list of
options into one group silently.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from math import isfinite, prod

from cfsp.errors import ConfigError, printable
from cfsp.system.package import config_folder

#: Most characters of an override, levels of brackets and digits of a number.
MAX_LENGTH, MAX_DEPTH, MAX_DIGITS = 8_000, 16, 400
#: Most runs of one sweep.
MAX_RUNS = 10_000


def check_overrides(overrides: Sequence[str], *, sweep: bool = False) -> None:
    """Refuse overrides for which Hydra needs unbounded time or memory, or which it misreads.

    Args:
        overrides: overrides of the command line, ``key=value``.
        sweep: whether several values of a key stand for several runs.

    Raises:
        ConfigError: overrides are refused; the message has one line for each.
    """
    problems = [problem for override in overrides if (problem := _problem(override)) is not None]
    if not problems and sweep:
        problems = [*_sweep_problems(overrides)]
    if problems:
        raise ConfigError(*problems)


def _problem(override: str) -> str | None:
    shown = printable(override if len(override) <= 100 else f"{override[:97]}...")
    key, _, value = override.partition("=")
    if not override.strip():
        return "'': an empty word; write key=value, and quotes around a variable of the shell that may be empty"
    if len(override) > MAX_LENGTH:
        return f"{shown}: {len(override):,} characters, at most {MAX_LENGTH:,} are read; put long values into a file"
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", override):
        return f"{shown}: holds a control character; write it without"
    try:
        override.encode()
    except UnicodeEncodeError:
        return f"{shown}: is not valid UTF-8; write it in UTF-8"
    if _depth(override) > MAX_DEPTH:
        return f"{shown}: brackets nested deeper than {MAX_DEPTH} levels; no key takes such a value"
    if re.search(rf"\d{{{MAX_DIGITS + 1}}}", override):
        return f"{shown}: a number of more than {MAX_DIGITS} digits; no key takes one so large"
    group = key.lstrip("+~")
    if value[:1] == "[" and re.fullmatch(r"[\w/]+", group) and (config_folder() / group).is_dir():
        return f"{shown}: one option is expected; several need a sweep: -m {group}=A,B (one run each)"
    return None


def _depth(override: str) -> int:
    depth = deepest = 0
    for letter in override:
        if letter in "[{(":
            depth += 1
            deepest = max(depth, deepest)
        elif letter in "]})":
            depth -= 1
    return deepest


def _sweep_problems(overrides: Sequence[str]) -> Iterator[str]:
    """Yield a line for each key without a value to run, and a line if there are more than MAX_RUNS runs."""
    counts = []
    for override in overrides:
        key, _, value = override.partition("=")
        ranged = re.fullmatch(r"range\(([^()]*)\)", value.strip())
        if ranged is not None:
            count = _range_length(ranged[1])
            if count is None:
                yield f"{override}: expected range(FIRST,END,STEP) of numbers, e.g. {key}=range(0.2,0.6,0.1)"
                continue
            if count < 1:
                yield f"{override}: the range holds no value; give FIRST, END beyond it and a STEP that leads there"
                continue
            counts.append(count)
        elif value.startswith("glob("):
            yield from _glob_problem(override, key, value)
        elif "," in value:
            counts.append(value.count(",", 0) + 1 if value[:1] not in "[{('\"" else 1)
    if prod(counts) > MAX_RUNS:
        yield f"{prod(counts):,} runs in one sweep, at most {MAX_RUNS:,} are taken; give fewer values"


def _range_length(arguments: str) -> int | None:
    """Return the number of values of a range; None if the arguments are not one to three numbers."""
    named = [part.rpartition("=")[2] for part in arguments.split(",")]
    try:
        numbers = [float(part) for part in named]
    except ValueError:
        return None
    if len(numbers) not in (1, 2, 3) or not all(map(isfinite, numbers)):
        return None
    first, end = (0.0, numbers[0]) if len(numbers) == 1 else numbers[:2]
    step = numbers[2] if len(numbers) == 3 else 1.0
    if step == 0 or (end - first) * step <= 0:
        return 0
    length = (end - first) / step
    return int(length) + (length != int(length)) if length < 1e18 else 10**18


def _glob_problem(override: str, key: str, value: str) -> Iterator[str]:
    import fnmatch  # start-up time: few command lines have a glob

    folder = config_folder() / key
    options = sorted(path.stem for path in folder.glob("*.yaml")) if re.fullmatch(r"[\w/]+", key) else []
    if not options:
        yield f"{override}: glob(...) is for groups; write the values of a key, {key}=a,b,c"
        return
    simple = re.fullmatch(r"glob\(\s*([^,()\[\]=]*?)\s*\)", value)
    if simple is not None and not fnmatch.filter(options, simple[1].strip("'\"")):
        yield f"{override}: no option matches; options: {', '.join(options)}"
