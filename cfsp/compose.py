"""Composing the configuration outside the command line, and explaining what Hydra refuses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from cfsp.components import suggest
from cfsp.errors import ConfigError
from cfsp.package import config_folder


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration that ``cfsp <overrides>`` would run, also from within a running Hydra application.

    Raises:
        ConfigError: an unknown key, group or option.
    """
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_folder().resolve()), version_base="1.3"):
            return hydra_compose("config", overrides=list(overrides))
    except HydraException as error:
        raise explain(error) from error
    finally:
        GlobalHydra.instance().hydra = outer


def explain(error: Exception) -> ConfigError:
    """One line for what Hydra says in many: the key or option, what is allowed, the nearest match."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return ConfigError(_unknown_option(error))
    text = str(error)
    if isinstance(error, OverrideParseException):
        return ConfigError(f"{error.override}: not a valid override; write key=value (quote values with , = or spaces)")
    if isinstance(error, ConfigCompositionException) or "override" in text:
        found = re.search(r"Could not override '([^']*)'|Key '([^']*)' is not in struct|group '([^']*)'", text)
        if found:
            key = next(part for part in found.groups() if part)
            full = re.search(r"full_key: (\S+)", text)
            return ConfigError(_unknown_key(full.group(1) if full else key))
    return ConfigError(" ".join(text.split()))


def _unknown_option(error: MissingConfigException) -> str:
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    options = sorted(error.options or [])
    return f"{group}={option}: there is no such option{suggest(option, options)}; options: {', '.join(options)}"


def _unknown_key(key: str) -> str:
    known = set(_keys(_defaults())) | {path.name for path in config_folder().iterdir() if path.is_dir()}
    near = suggest(key, known)
    if not near:
        leaf = key.rpartition(".")[2]
        near = suggest(leaf, known)
    return f"{key}: there is no such key{near}; all keys: cfsp --cfg job"


def _defaults() -> Mapping[str, Any]:
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_folder().resolve()), version_base="1.3"):
            values = OmegaConf.to_container(hydra_compose("config"), resolve=False)
    finally:
        GlobalHydra.instance().hydra = outer
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield prefix + str(key)
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{key}.")
