"""Lines about wrong values of the configuration: the key, its value, the expected values and an example."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from cfsp.errors import printable
from cfsp.system.expected import Expected, expected_at, fields_of, takes_numbers_only

#: Most items and levels of a nested value that are shown.
_SHOWN_ITEMS, _SHOWN_DEPTH = 60, 8


def problems_of(error: ValidationError, prefix: str, schema: type) -> list[str]:
    """Describe validation errors, one line for each key: its value, the expected values and an example.

    The lines never contain the validator's own words. Messages of cfsp's checks (a ``ValueError`` in a validator) are
    kept unchanged.

    Args:
        error: error of pydantic.
        prefix: key of the section or component.
        schema: its class.
    """
    lines: dict[str, str] = {}
    for finding in error.errors(include_url=False):
        expected = expected_at(schema, finding["loc"])
        key = _key(prefix, expected.key)
        lines.setdefault(key or str(len(lines)), _problem(finding, key, expected, prefix, schema))
    return list(lines.values())


def booleans_for_numbers(schema: type, values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Yield a line for each number that is given as true or false, which the validator would read as 1 or 0."""
    for name, field in fields_of(schema).items():
        key, value = _key(prefix, (name,)), values.get(name)
        if isinstance(value, bool) and takes_numbers_only(field.annotation):
            expected = expected_at(schema, (name,))
            yield f"{key}={shown(value)}: expected {expected.description}{expected.example(key)}"
        elif isinstance(value, Mapping) and isinstance(field.annotation, type) and fields_of(field.annotation):
            yield from booleans_for_numbers(field.annotation, value, key)


def _problem(finding: Any, key: str, expected: Expected, prefix: str, schema: type) -> str:
    """Return the line about one finding of the validator."""
    kind, location, value = finding["type"], finding["loc"], finding.get("input")
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        known = list(fields_of(schema)) if len(location) == 1 else []
        hint = f"; keys: {', '.join(known)}" if known else ""
        return f"{key}={shown(value)}: unknown key{suggest(str(location[-1]), known)}{hint}"
    if kind in ("value_error", "assertion_error"):
        message = str(finding.get("ctx", {}).get("error") or finding["msg"].partition(", ")[2])
        if not location or message.startswith(f"{prefix}."):  # a check over several keys names them itself
            return message
        described = expected.field.description if expected.field is not None else None
        return f"{key}={shown(value)}: {message}" + (f" ({described})" if described else "")
    if not location:
        return f"{prefix or 'configuration'}={shown(value)}: expected a group of keys: {', '.join(fields_of(schema))}"
    described = expected.field.description if expected.field is not None else None
    needed = f"{expected.description}{expected.example(key)}" + (f" ({described})" if described else "")
    if kind.startswith("missing") and isinstance(location[-1], int):
        whole = expected_at(schema, location[:-1])
        list_key = _key(prefix, whole.key)
        return (
            f"{list_key}={shown(value)}: item {location[-1] + 1} is missing; expected {whole.description}"
            f"{whole.example(list_key)}"
        )
    if kind.startswith("missing"):
        return f"{key} is not set: give it a value, {key}=...; expected {needed}"
    near = suggest(str(value)[:100], _literal_values(expected.annotation)) if isinstance(value, str) else ""
    quotes = ""
    if kind == "string_type" and _is_scalar(value):
        whole_word = isinstance(expected.key[-1], str)
        quotes = f"; write it in quotes, \"{key}='{shown(value)}'\"" if whole_word else "; write it in quotes"
    return f"{key}={shown(value)}: expected {needed}{near}{quotes}"


def _literal_values(annotation: Any) -> list[str]:
    """Return the values of a Literal annotation as texts; an empty list for other annotations."""
    members = [annotation, *get_args(annotation)]
    return [str(word) for member in members if get_origin(member) is Literal for word in get_args(member)]


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def _key(prefix: str, location: tuple[int | str, ...]) -> str:
    key = prefix
    for part in location:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else part
    return key


def shown(value: Any, depth: int = 0) -> str:
    """Return a value in the notation of the command line, on one line of at most 120 characters."""
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    elif depth > _SHOWN_DEPTH:
        text = "..."
    elif isinstance(value, list | tuple):
        text = f"[{','.join(_shown_items(value, depth))}]"
    elif isinstance(value, Mapping):
        pairs = islice(value.items(), _SHOWN_ITEMS)
        text = f"{{{','.join(f'{shown(key)}:{shown(item, depth + 1)}' for key, item in pairs)}}}"
    elif isinstance(value, int) and abs(value) >= 10**100:  # str() refuses more than 4,300 digits
        text = f"{'-' if value < 0 else ''}10^{int(abs(value).bit_length() * 0.30103)}"
    else:
        text = printable(str(value)) or "''"
    return text if len(text) <= 120 else f"{text[:117]}..."


def _shown_items(values: Iterable[Any], depth: int) -> list[str]:
    return [shown(item, depth + 1) for item in islice(values, _SHOWN_ITEMS)]


def suggest(word: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean X?"`` for the nearest choice, or an empty string if none is near."""
    near = difflib.get_close_matches(word[:100], list(choices), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
