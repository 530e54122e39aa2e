"""Experiments: the grid of runs in ``experiments/<name>/grid.yaml``, in several variants."""

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
from pydantic import Field, ValidationError, model_validator

from cfsp.config.components import problems_of, suggest
from cfsp.config.sections import Section
from cfsp.errors import ConfigError
from cfsp.system.override_check import check_overrides
from cfsp.system.package import experiments_folder
from cfsp.system.yaml_files import check_yaml

#: File of an experiment that holds its grid of runs.
GRID = "grid.yaml"
#: Value of a key in an entry of the grid. A list is an axis, and an empty list leaves the key out. A mapping is an axis
#: of labels, each with its list of overrides.
Values = str | int | float | bool | None | list[str | int | float | bool | None] | dict[str, list[str]]


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        overrides: overrides of its command line.
        point: its coordinates in the grid, key -> value, as tables show them.
    """

    overrides: tuple[str, ...]
    point: Mapping[str, str]

    def __str__(self) -> str:
        return " ".join(self.overrides)


class Experiment(Section):
    """Grid of runs in several variants.

    Attributes:
        name: name of the folder of the experiment.
        title: what the experiment compares.
        runs: entries of the grid; an entry stands for the product of its axes.
        variants: name of each variant -> keys that it sets in every entry, in place of those of the entry.
        variant_runs: name of a variant -> entries that it uses instead of ``runs``.
    """

    name: str
    title: str
    runs: list[dict[str, Values]] = Field(min_length=1)
    variants: dict[str, dict[str, Values]] = Field(min_length=1)
    variant_runs: dict[str, list[dict[str, Values]]] = Field(default={})

    @model_validator(mode="after")
    def _variants_are_known(self) -> Experiment:
        unknown = sorted(set(self.variant_runs) - set(self.variants))
        if unknown:
            raise ValueError(f"variant_runs.{unknown[0]}: no such variant; variants: {', '.join(self.variants)}")
        return self

    def cells(self, variant: str, fixed: Mapping[str, Values] | None = None) -> list[Cell]:
        """Return every run of a variant once, in order.

        Args:
            variant: name of the variant.
            fixed: keys of the command line, which replace those of the experiment.

        Raises:
            ConfigError: there is no such variant.
        """
        if variant not in self.variants:
            raise ConfigError(
                f"variant={variant}: experiment={self.name} has no such variant{suggest(variant, self.variants)}; "
                f"variants: {', '.join(self.variants)}"
            )
        cells: dict[tuple[str, ...], Cell] = {}
        for entry in self.variant_runs.get(variant, self.runs):
            merged = {**entry, **self.variants[variant], **(fixed or {})}
            for cell in _product({key: values for key, values in merged.items() if values != []}):
                cells.setdefault(tuple(sorted(cell.overrides)), cell)
        return list(cells.values())


def load_experiment(name: str) -> Experiment:
    """Load the experiment with this name.

    Raises:
        ConfigError: there is no such experiment, or a key of its file is wrong.
    """
    names = experiment_names()
    if name not in names:
        raise ConfigError(
            f"experiment={name}: there is no such experiment{suggest(name, names)}; experiments: {', '.join(names)}"
        )
    return read_experiment(experiment_folder(name) / GRID)


def experiment_names() -> list[str]:
    """Return the names of the experiments in the working folder and in cfsp, sorted."""
    return sorted({path.parent.name for root in _experiment_roots() for path in root.glob(f"*/{GRID}")})


def experiment_folder(name: str, file: str = GRID) -> Path:
    """Return the folder of an experiment that holds ``file``: in the working folder, otherwise in cfsp."""
    local, packaged = (root / name for root in _experiment_roots())
    return local if (local / file).is_file() else packaged


def _experiment_roots() -> tuple[Path, Path]:
    return Path("experiments"), experiments_folder()


def read_experiment(path: Path) -> Experiment:
    """Read the grid file of an experiment.

    Raises:
        ConfigError: the file is not a YAML file, or one of its keys is wrong.
    """
    try:
        values: Any = OmegaConf.to_container(OmegaConf.create(check_yaml(path, path.name)))
    except (OSError, ValueError, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from error
    try:
        return Experiment(name=path.parent.name, **values)
    except (ValidationError, TypeError) as error:
        lines = problems_of(error, "", Experiment) if isinstance(error, ValidationError) else [str(error)]
        raise ConfigError(*(f"experiment={path.parent.name}: {line}" for line in lines)) from error


def override_values(overrides: Sequence[str]) -> dict[str, Values]:
    """Parse ``key=value``, ``key=a,b,c`` and ``~key`` (leave the experiment's key out) of a command line.

    Returns:
        The value of each key: a string, a list of strings, or an empty list for ``~key``.

    Raises:
        ConfigError: an override of another form.
    """
    check_overrides(overrides)
    values_by_key: dict[str, Values] = {}
    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
            if not override.key_or_group or (not text.partition("=")[1] and not override.is_delete()):
                raise ValueError(text)
            if override.is_delete():
                values_by_key[override.key_or_group] = []
                continue
            several = override.is_discrete_sweep()
            values = [*override.sweep_string_iterator()] if several else [text.partition("=")[2]]
        except (HydraException, ValueError, TypeError) as error:
            raise ConfigError(f"{text}: write key=value, key=a,b,c for several, ~key to leave one out") from error
        values_by_key[text.partition("=")[0]] = list(values) if several else values[0]
    return values_by_key


def _product(entry: Mapping[str, Values]) -> Iterator[Cell]:
    axes = [_choices(key, values) for key, values in entry.items()]
    for choice in product(*axes):
        overrides = tuple(override for _, _, chosen in choice for override in chosen)
        yield Cell(overrides, {key: label for key, label, _ in choice})


def _choices(key: str, values: Values) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return (key, label, overrides) for each value of an axis."""
    if isinstance(values, dict):
        return [(key, label, tuple(overrides)) for label, overrides in values.items()]
    texts = [_command_line_text(value) for value in (values if isinstance(values, list) else [values])]
    return [(key, text, (f"{key}={text}",)) for text in texts]


def _command_line_text(value: str | float | bool | None) -> str:
    """Return a value in the notation of the command line. Strings stay unchanged, with their quotes or brackets."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
