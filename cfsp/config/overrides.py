"""The command lines that are none of Hydra's: plain ``key=value`` words."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from cfsp.config.components import suggest
from cfsp.errors import one_line


def plain_values(words: Sequence[str], keys: Collection[str], command: str) -> tuple[dict[str, str], list[str]]:
    """(key -> value, what is wrong, a line each) of the words after ``cfsp COMMAND``, which knows ``keys``."""
    given: dict[str, str] = {}
    problems = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            problems.append(f"{word}: is not key=value; see cfsp {command} --help")
        elif key not in keys:
            problems.append(f"{key}: unknown key{suggest(key, keys)}; keys: {', '.join(keys)}")
        elif not value:
            problems.append(f"{key}=: has no value; see cfsp {command} --help")
        else:
            given[key] = value
    return given, [one_line(problem) for problem in problems]
