"""Checked command line of a sweep, of its tables or of its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from cfsp.config.components import build, suggest
from cfsp.config.contracts import Launcher
from cfsp.errors import ConfigError
from cfsp.sweep.experiment import Cell, Experiment, Values, experiment_names, load_experiment, override_values
from cfsp.system.package import config_folder

#: Keys of the sweep itself. All other keys are overrides of the runs.
_SWEEP_KEYS = ("experiment", "variant", "status", "launcher")


@dataclass(frozen=True)
class Request:
    """Checked command line of a sweep, of its tables or of its report.

    Attributes:
        experiment: the experiment.
        variant: variant of the experiment.
        cells: runs of the variant.
        varying: keys whose values differ between runs.
        launcher: launcher of the runs.
        status: whether the states of the runs are listed and nothing is executed.
        force: whether finished runs are repeated.
        fixed: overrides of the command line, which apply to all runs.
    """

    experiment: Experiment
    variant: str
    cells: list[Cell]
    varying: list[str]
    launcher: Launcher
    status: bool
    force: bool
    fixed: Mapping[str, Values]

    def named(self, cell: Cell) -> str:
        """Return a name for a run: the keys whose values differ between runs, with its values."""
        return " ".join(f"{key}={cell.point[key]}" for key in self.varying if key in cell.point) or str(cell)


def read_request(overrides: Sequence[str]) -> Request:
    """Read a command line of a sweep or of its tables.

    Raises:
        ConfigError: a key or a value is wrong.
    """
    values = override_values(overrides)
    sweep_values = {key: values.pop(key) for key in [*values] if key in _SWEEP_KEYS or key.startswith("launcher.")}
    if "experiment" not in sweep_values:
        raise ConfigError(f"experiment is not set: give experiment=NAME; experiments: {', '.join(experiment_names())}")
    experiment = load_experiment(str(sweep_values["experiment"]))
    variant = str(sweep_values.get("variant", "bundled"))
    cells = experiment.cells(variant, {**_default_overrides(experiment.name, variant, values), **values})
    points = [cell.point for cell in cells]
    keys = dict.fromkeys(key for point in points for key in point)
    varying = [key for key in keys if len({point[key] for point in points if key in point}) > 1]
    return Request(
        experiment,
        variant,
        cells,
        varying,
        _launcher(sweep_values, _allowed_packages(values)),
        status=_flag(sweep_values, "status"),
        force=str(values.get("force", "false")).lower() == "true",
        fixed=values,
    )


def records_folder(name: str, variant: str) -> Path:
    """Return the folder with the records of an experiment, relative to the working folder."""
    return Path("results") / "records" / name / variant


def _default_overrides(name: str, variant: str, values: Mapping[str, Values]) -> dict[str, Values]:
    """Return the overrides that a sweep adds unless the command line sets the same keys."""
    defaults: dict[str, Values] = {
        "save.model": "false",
        "paths.output_dir": f"outputs/sweeps/{name}/{variant}",
        "paths.records_dir": str(records_folder(name, variant)),
    }
    if values.get("logger", "wandb") == "wandb":
        defaults["logger.group"] = f"{name}-{variant}"
    return {key: value for key, value in defaults.items() if key not in values}


def _launcher(sweep_values: Mapping[str, Values], allowed: Sequence[str] = ()) -> Launcher:
    name = str(sweep_values.get("launcher", "sequential"))
    path = config_folder() / "launcher" / f"{name}.yaml"
    if not path.is_file():
        names = options("launcher")
        raise ConfigError(
            f"launcher={name}: there is no such launcher{suggest(name, names.split(', '))}; there are {names}"
        )
    values: Any = OmegaConf.to_container(OmegaConf.load(path))
    for key, value in sweep_values.items():
        if key.startswith("launcher."):
            values[key.removeprefix("launcher.")] = _parse_value(key, value)
    return build("launcher", values, allowed, Launcher).instance


def _allowed_packages(values: Mapping[str, Values]) -> list[str]:
    """Return the packages of ``plugins.allow``, whose launchers may be used too."""
    if "plugins.allow" not in values:
        return []
    packages = _parse_value("plugins.allow", values["plugins.allow"])
    return [str(package) for package in packages] if isinstance(packages, list) else []


def _parse_value(key: str, value: Values) -> Any:
    """Parse a value of the command line as Hydra does.

    Raises:
        ConfigError: the key has several values, or none.
    """
    if isinstance(value, list | dict):
        raise ConfigError(f"{key}: a launcher's key has one value; write a list as {key}=[a,b]")
    return OverridesParser.create().parse_override(f"{key}={value}").value()


def _flag(sweep_values: Mapping[str, Values], key: str) -> bool:
    value = str(sweep_values.get(key, "false")).lower()
    if value not in ("true", "false"):
        raise ConfigError(f"{key}={value}: use true or false")
    return value == "true"


def options(group: str) -> str:
    """Return the names of the options of a config group, separated by commas."""
    return ", ".join(sorted(path.stem for path in (config_folder() / group).glob("*.yaml")))
