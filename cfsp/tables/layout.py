"""Layout of an experiment's tables and figures: ``experiments/<name>/tables.yaml``."""

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
    """A column with the mean of several figures.

    Attributes:
        mean: pattern of the figures, as ``suite/task/metric``.
        label: head of the column.
    """

    mean: str
    label: str


class GapOf(Section):
    """Columns with the logarithm of a figure minus that of the dense model. Perplexities give nats per token.

    Attributes:
        gap: pattern of the figures, as ``suite/task/metric``.
        label: head of the column; None: derived from the name of the figure.
    """

    gap: str
    label: str | None = None


#: Metric of a table or figure. It is a pattern ``suite/task/metric`` with * and ? (several are separated by |), the
#: mean of such figures, their gap to dense, or a figure of the run: ``removed`` (share of the scope's parameters),
#: ``trained`` (parameters), ``pruning_time`` or ``peak_memory``.
MetricSpec = str | MeanOf | GapOf


class TableLayout(Section):
    """Layout of a table. Seeds are averaged. Every other key that the layout does not name must have a single value.

    Attributes:
        caption: caption of the table.
        where: key -> value that selects the runs.
        groups: keys whose values divide the table into sections.
        rows: keys whose values name a row.
        metrics: the columns.
        labels: key, value or ``key=value`` -> text to show instead.
        variants: variants of the experiment that have this table; empty: all of them.
    """

    caption: str
    where: dict[str, str] = Field(default={})
    groups: list[str] = Field(default=[])
    rows: list[str] = Field(min_length=1)
    metrics: list[MetricSpec] = Field(min_length=1)
    labels: dict[str, str] = Field(default={})
    variants: list[str] = Field(default=[])


class FigureLayout(Section):
    """Layout of a figure.

    Attributes:
        kind: ``curve`` shows a metric against a key, ``pareto`` a metric against another one, ``blocks`` the distance
            and the kept width of each block.
        caption: caption of the figure.
        x: key on the horizontal axis of a curve.
        x_metric: metric on the horizontal axis of a Pareto figure.
        metric: metric on the vertical axis.
        lines: keys with a line for each value.
        panels: keys with a panel for each value, in a figure of blocks.
        each: keys with a file for each value.
        where: key -> value that selects the runs.
        log: whether the metric has a logarithmic axis.
        variants: variants of the experiment that have this figure; empty: all of them.
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
    variants: list[str] = Field(default=[])


class Layout(Section):
    """Layout of an experiment.

    Attributes:
        tables: name of a table -> its layout.
        figures: name of a figure -> its layout.
        reported: published figures, from ``reported.csv`` beside the layout.
    """

    tables: dict[str, TableLayout] = Field(default={})
    figures: dict[str, FigureLayout] = Field(default={})
    reported: list[Published] = Field(default=[], exclude=True)

    def for_variant(self, variant: str) -> Layout:
        """Return the layout without the tables and figures of other variants."""
        tables = {name: each for name, each in self.tables.items() if not each.variants or variant in each.variants}
        figures = {name: each for name, each in self.figures.items() if not each.variants or variant in each.variants}
        return self.model_copy(update={"tables": tables, "figures": figures})


def load_layout(folder: Path) -> Layout:
    """Load the layout in ``folder`` with its published figures.

    Raises:
        ConfigError: the folder has no layout, or a key of the layout is wrong.
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
