"""Configurations of a grid: Hydra composes each choice of groups once, and single values are set afterwards."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from cfsp.config.compose import compose
from cfsp.config.parse import parse
from cfsp.config.run_config import RunConfig
from cfsp.errors import ConfigError
from cfsp.system.package import config_folder

#: An interpolation that names another key from the root, and nothing else.
_ANOTHER_KEY = re.compile(r"\$\{([A-Za-z_][\w.]*)\}")


class GridComposer:
    """Compose many command lines that differ in a few values.

    Hydra takes 0.1 s for each command line. Almost all of it goes into the groups, which most runs of a grid share.
    Hydra itself composes every command line that has more than plain ``key=value`` of existing keys, so the results are
    the same.
    """

    def __init__(self) -> None:
        """Start without any composed choice of groups."""
        self._by_choices: dict[tuple[str, ...], dict[str, Any]] = {}
        self._configs: dict[tuple[str, ...], RunConfig] = {}

    def config(self, overrides: Sequence[str]) -> RunConfig:
        """Return ``parse(compose(overrides))``.

        Raises:
            ConfigError: the overrides cannot be composed, or the configuration is wrong.
        """
        key = tuple(overrides)
        if key not in self._configs:
            values = self._values(key)
            self._configs[key] = parse(compose(key) if values is None else values)
        return self._configs[key]

    def _values(self, overrides: tuple[str, ...]) -> dict[str, Any] | None:
        """Return the whole configuration as plain values; None where only Hydra can compose it."""
        parsed = [_parsed(word) for word in overrides]
        choices = tuple(word for word, override in zip(overrides, parsed, strict=True) if _is_choice(override))
        if choices not in self._by_choices:
            try:
                self._by_choices[choices] = _plain(choices)
            except ConfigError:  # Hydra's error about all overrides says more
                return None
        values = _copied(self._by_choices[choices])
        for override in parsed:
            if override is None or (not _is_choice(override) and not _put(values, override)):
                return None
        return values if _fill_in(values) else None


@cache
def _parsed(word: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(word)
    except (HydraException, ValueError):
        return None


def _plain(choices: Sequence[str]) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(compose(choices), resolve=False)
    return values


def _is_choice(override: Override | None) -> bool:
    """Return whether the override chooses an option of a group."""
    return override is not None and _is_group(str(override.key_or_group))


@cache
def _is_group(key: str) -> bool:
    return re.fullmatch(r"\w+(/\w+)*", key) is not None and (config_folder() / key).is_dir()


def _put(values: dict[str, Any], override: Override) -> bool:
    """Set an existing key to a plain value; returns whether that was possible."""
    word = str(override.input_line)
    simple = not (override.is_delete() or override.is_add() or override.is_force_add() or override.is_sweep_override())
    if not simple or override.package is not None or "$" in word or "?" in word:
        return False
    value = override.value()
    if not _is_plain(value):
        return False
    *parents, last = str(override.key_or_group).split(".")
    place: Any = values
    for parent in parents:
        place = place.get(parent) if isinstance(place, dict) else None
    if not isinstance(place, dict) or last not in place or (isinstance(place[last], Mapping) and value is not None):
        return False
    place[last] = _copied(value)
    return True


def _copied(value: Any) -> Any:
    """Copy plain values; :func:`copy.deepcopy` takes several times as long, once for each run of a grid."""
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def _is_plain(value: Any) -> bool:
    """Return whether Hydra sets the value as it is. Mappings are merged instead."""
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)


def _fill_in(values: dict[str, Any]) -> bool:
    """Replace interpolations of another key by its value; returns whether nothing is left for OmegaConf to resolve."""
    for place, key, text in list(_unresolved(values)):
        reference = _ANOTHER_KEY.fullmatch(text)
        value: Any = values if reference is not None else text
        for part in reference.group(1).split(".") if reference is not None else ():
            value = value.get(part) if isinstance(value, dict) else text
        if isinstance(value, dict | list) or (isinstance(value, str) and ("$" in value or "???" in value)):
            return False
        place[key] = value
    return True


def _unresolved(value: Any) -> Iterator[tuple[Any, Any, str]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        if isinstance(part, str):
            if "$" in part or part == "???":
                yield value, key, part
        else:
            yield from _unresolved(part)
