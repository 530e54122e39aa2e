"""Fast composition of the configurations of a grid: Hydra composes each choice of groups only once."""

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

#: Interpolation that consists of a reference to another key from the root.
_ANOTHER_KEY = re.compile(r"\$\{([A-Za-z_][\w.]*)\}")


class GridComposer:
    """Composer of many command lines that differ in a few values.

    Hydra needs 0.1 s for each command line, almost all of it for the groups, which most runs of a grid share. So Hydra
    composes each choice of groups once, and plain ``key=value`` overrides of existing keys are set in a copy. Any other
    command line is composed by Hydra, so the results are the same.
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
        """Return the whole configuration as plain values; None if only Hydra can compose it."""
        parsed = [_parse(text) for text in overrides]
        choices = tuple(text for text, override in zip(overrides, parsed, strict=True) if _is_choice(override))
        if choices not in self._by_choices:
            try:
                self._by_choices[choices] = _compose_groups(choices)
            except ConfigError:  # Hydra's error about all overrides says more
                return None
        values = _copy_plain(self._by_choices[choices])
        for override in parsed:
            if override is None or (not _is_choice(override) and not _set_value(values, override)):
                return None
        return values if _resolve_references(values) else None


@cache
def _parse(text: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(text)
    except (HydraException, ValueError):
        return None


def _compose_groups(choices: Sequence[str]) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(compose(choices), resolve=False)
    return values


def _is_choice(override: Override | None) -> bool:
    """Return whether the override chooses an option of a group."""
    return override is not None and _is_group(str(override.key_or_group))


@cache
def _is_group(key: str) -> bool:
    return re.fullmatch(r"\w+(/\w+)*", key) is not None and (config_folder() / key).is_dir()


def _set_value(values: dict[str, Any], override: Override) -> bool:
    """Set an existing key to a plain value; return whether that was possible."""
    text = str(override.input_line)
    simple = not (override.is_delete() or override.is_add() or override.is_force_add() or override.is_sweep_override())
    if not simple or override.package is not None or "$" in text or "?" in text:
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
    place[last] = _copy_plain(value)
    return True


def _copy_plain(value: Any) -> Any:
    """Copy plain values; :func:`copy.deepcopy` takes several times as long, once for each run of a grid."""
    if isinstance(value, dict):
        return {key: _copy_plain(inner) for key, inner in value.items()}
    return [_copy_plain(inner) for inner in value] if isinstance(value, list) else value


def _is_plain(value: Any) -> bool:
    """Return whether Hydra sets the value unchanged. Hydra merges mappings instead."""
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)


def _resolve_references(values: dict[str, Any]) -> bool:
    """Replace references to other keys by their values; return False if OmegaConf has to resolve a value."""
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
