"""Parser for command lines without Hydra, which hold plain ``key=value`` overrides."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from cfsp.config.problems import suggest
from cfsp.errors import one_line


def plain_values(overrides: Sequence[str], keys: Collection[str], command: str) -> tuple[dict[str, str], list[str]]:
    """Parse the overrides after ``cfsp COMMAND``.

    Args:
        overrides: overrides of the command line, as values.
        keys: keys that the command knows.
        command: name of the command, for messages.

    Returns:
        Key -> value, and a line for each wrong override.
    """
    values: dict[str, str] = {}
    problems = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            problems.append(f"{override}: is not key=value; see cfsp {command} --help")
        elif key not in keys:
            problems.append(f"{key}: unknown key{suggest(key, keys)}; keys: {', '.join(keys)}")
        elif not value:
            problems.append(f"{key}=: has no value; see cfsp {command} --help")
        else:
            values[key] = value
    return values, [one_line(problem) for problem in problems]
