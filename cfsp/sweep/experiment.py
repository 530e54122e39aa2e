"""An experiment: the grid of runs in ``experiments/<name>/grid.yaml``, in the variant that was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError

from cfsp.config.components import problems_of, suggest
from cfsp.config.sections import Section
from cfsp.errors import ConfigError
from cfsp.system.package import experiments_folder
from cfsp.system.words_check import check_words
from cfsp.system.yaml_files import check_yaml

#: File of an experiment that holds its grid of runs.
GRID = "grid.yaml"
#: What an entry says of a key: one value, or several (an axis; none: the key is left out), or names for lists of
#: overrides (an axis of arms).
Values = str | int | float | bool | None | list[str | int | float | bool | None] | dict[str, list[str]]


@dataclass(frozen=True)
class Cell:
    """One run: the ``words`` of its command line, and where it is in the grid (key -> value, as shown in tables)."""

    words: tuple[str, ...]
    point: Mapping[str, str]

    def __str__(self) -> str:
        return " ".join(self.words)


class Experiment(Section):
    """``runs``: each entry is the product of its axes; ``variants``: keys that a variant sets in every entry.

    Where an entry has the key already, the variant's values replace the entry's.
    """

    name: str
    title: str
    runs: list[dict[str, Values]] = Field(min_length=1)
    variants: dict[str, dict[str, Values]] = Field(min_length=1)

    def cells(self, variant: str, given: Mapping[str, Values] | None = None) -> list[Cell]:
        """Every run once, in order; ``given``: keys of the command line, which replace what the experiment says.

        Raises:
            ConfigError: there is no such variant.
        """
        if variant not in self.variants:
            raise ConfigError(
                f"variant={variant}: experiment={self.name} has no such variant{suggest(variant, self.variants)}; "
                f"variants: {', '.join(self.variants)}"
            )
        found: dict[tuple[str, ...], Cell] = {}
        for entry in self.runs:
            merged = {**entry, **self.variants[variant], **(given or {})}
            for cell in _product({key: values for key, values in merged.items() if values != []}):
                found.setdefault(tuple(sorted(cell.words)), cell)
        return list(found.values())


def load_experiment(name: str) -> Experiment:
    """The experiment ``name``.

    Raises:
        ConfigError: there is none, or its file is not one: the key and what is expected.
    """
    names = experiment_names()
    if name not in names:
        raise ConfigError(
            f"experiment={name}: there is no such experiment{suggest(name, names)}; experiments: {', '.join(names)}"
        )
    return read_experiment(experiment_folder(name) / GRID)


def experiment_names() -> list[str]:
    """Names of the experiments of the working folder and of those that come with cfsp, sorted."""
    return sorted({path.parent.name for home in _homes() for path in home.glob(f"*/{GRID}")})


def experiment_folder(name: str, file: str = GRID) -> Path:
    """Return the folder of an experiment that holds ``file``: in the working folder, else the one that ships."""
    own, shipped = (home / name for home in _homes())
    return own if (own / file).is_file() else shipped


def _homes() -> tuple[Path, Path]:
    return Path("experiments"), experiments_folder()


def read_experiment(path: Path) -> Experiment:
    """The experiment in a file."""
    try:
        values: Any = OmegaConf.to_container(OmegaConf.create(check_yaml(path, path.name)))
    except (OSError, ValueError, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from error
    try:
        return Experiment(name=path.parent.name, **values)
    except (ValidationError, TypeError) as error:
        lines = problems_of(error, "", Experiment) if isinstance(error, ValidationError) else [str(error)]
        raise ConfigError(*(f"experiment={path.parent.name}: {line}" for line in lines)) from error


def given_values(words: Sequence[str]) -> dict[str, Values]:
    """``key=value``, ``key=a,b,c`` and ``~key`` (leave out what the experiment says) of a command line.

    Raises:
        ConfigError: a word of another form.
    """
    check_words(words)
    found: dict[str, Values] = {}
    parser = OverridesParser.create()
    for word in words:
        try:
            override = parser.parse_override(word)
            if not override.key_or_group or (not word.partition("=")[1] and not override.is_delete()):
                raise ValueError(word)
            if override.is_delete():
                found[override.key_or_group] = []
                continue
            several = override.is_discrete_sweep()
            values = [*override.sweep_string_iterator()] if several else [word.partition("=")[2]]
        except (HydraException, ValueError, TypeError) as error:
            raise ConfigError(f"{word}: write key=value, key=a,b,c for several, ~key to leave one out") from error
        found[word.partition("=")[0]] = list(values) if several else values[0]
    return found


def _product(entry: Mapping[str, Values]) -> Iterator[Cell]:
    axes = [_choices(key, values) for key, values in entry.items()]
    for choice in product(*axes):
        words = tuple(word for _, _, given in choice for word in given)
        yield Cell(words, {key: label for key, label, _ in choice})


def _choices(key: str, values: Values) -> list[tuple[str, str, tuple[str, ...]]]:
    """(key, label, words) for each value."""
    if isinstance(values, dict):
        return [(key, label, tuple(words)) for label, words in values.items()]
    texts = [_text(value) for value in (values if isinstance(values, list) else [values])]
    return [(key, text, (f"{key}={text}",)) for text in texts]


def _text(value: str | float | bool | None) -> str:
    """A value as Hydra reads it on the command line; a string is one already, with its quotes or brackets."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
