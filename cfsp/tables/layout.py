"""How an experiment's tables and figures are laid out: ``experiments/<name>/tables.yaml``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError

from cfsp.config.components import problems_of
from cfsp.config.sections import Section
from cfsp.errors import ConfigError
from cfsp.tables.reported import Published, load_reported


class MeanOf(Section):
    """The mean of all figures that match ``mean``, under a name of its own."""

    mean: str
    label: str


class GapOf(Section):
    """The logarithm of each figure that matches ``gap`` less the dense model's: of perplexities, nats per token."""

    gap: str
    label: str | None = None


#: ``suite/task/metric`` with * and ? (several of them with | between), the mean of such, their gap to dense, or of the
#: run: ``removed`` (of the scope's parameters), ``trained`` (parameters), ``pruning_time``, ``peak_memory``.
MetricSpec = str | MeanOf | GapOf


class TableLayout(Section):
    """``groups``: keys with a section of rows for each value; ``rows``: keys that name a row; ``metrics``: columns.

    Seeds are averaged. Every other key must have one value. ``where``: the runs that it is about (key: value).
    """

    caption: str
    where: dict[str, str] = Field(default={})
    groups: list[str] = Field(default=[])
    rows: list[str] = Field(min_length=1)
    metrics: list[MetricSpec] = Field(min_length=1)
    labels: dict[str, str] = Field(default={})


class FigureLayout(Section):
    """``curve``: a metric against ``x``, a line per value of ``lines``; ``pareto``: ``metric`` against ``x_metric``;
    ``blocks``: importance and kept width by block, a panel per value of ``panels``. ``each``: a file per value of these
    keys, where there are several.
    """

    kind: Literal["curve", "pareto", "blocks"]
    caption: str
    x: str | None = None
    x_metric: str | None = None
    metric: str | None = None
    lines: list[str] = Field(default=[])
    panels: list[str] = Field(default=[])
    each: list[str] = Field(default=[])
    where: dict[str, str] = Field(default={})
    log: bool = False


class Layout(Section):
    """``reported``: what is published of it, from ``reported.csv`` beside the layout."""

    tables: dict[str, TableLayout] = Field(default={})
    figures: dict[str, FigureLayout] = Field(default={})
    reported: list[Published] = Field(default=[], exclude=True)


def load_layout(folder: Path) -> Layout:
    """The layout in ``folder``, with its published figures.

    Raises:
        ConfigError: there is none, or it is wrong: the key and what is expected.
    """
    path = folder / "tables.yaml"
    if not path.is_file():
        raise ConfigError(f"{path}: there is no layout for this experiment; run this from the checkout, or write one")
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from error
    reported = load_reported(folder / "reported.csv")
    try:
        return Layout(**values, reported=reported)
    except (ValidationError, TypeError) as error:
        lines = problems_of(error, "", Layout) if isinstance(error, ValidationError) else [str(error)]
        raise ConfigError(*(f"{path}: {line}" for line in lines)) from error
