"""The checked command line of a sweep, of its tables or of its report."""

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

#: Keys of the sweep itself. All other keys go to the runs.
_OWN = ("experiment", "variant", "status", "launcher")


@dataclass(frozen=True)
class Request:
    """A checked command line.

    Attributes:
        experiment: the experiment.
        variant: its variant.
        cells: its runs.
        varying: keys whose values differ between runs.
        launcher: what starts the runs.
        status: list the state of the runs and run nothing.
        force: repeat finished runs.
        fixed: overrides of the command line, which go to all runs.
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
        """Name a run by the keys that tell it from the others of the grid."""
        return " ".join(f"{key}={cell.point[key]}" for key in self.varying if key in cell.point) or str(cell)


def request_of(overrides: Sequence[str]) -> Request:
    """Read a command line of a sweep or of its tables.

    Raises:
        ConfigError: a key or a value is wrong.
    """
    values = override_values(overrides)
    own = {key: values.pop(key) for key in [*values] if key in _OWN or key.startswith("launcher.")}
    if "experiment" not in own:
        raise ConfigError(f"experiment is not set: give experiment=NAME; experiments: {', '.join(experiment_names())}")
    experiment = load_experiment(str(own["experiment"]))
    variant = str(own.get("variant", "bundled"))
    cells = experiment.cells(variant, {**_default_overrides(experiment.name, variant, values), **values})
    points = [cell.point for cell in cells]
    keys = dict.fromkeys(key for point in points for key in point)
    varying = [key for key in keys if len({point[key] for point in points if key in point}) > 1]
    return Request(
        experiment,
        variant,
        cells,
        varying,
        _launcher(own, _allowed(values)),
        status=_flag(own, "status"),
        force=str(values.get("force", "false")).lower() == "true",
        fixed=values,
    )


def records_folder(name: str, variant: str) -> Path:
    """Return the folder with the records of an experiment, seen from the working folder."""
    return Path("results") / "records" / name / variant


def _default_overrides(name: str, variant: str, values: Mapping[str, Values]) -> dict[str, Values]:
    """Return the keys that a sweep sets unless the command line does."""
    defaults: dict[str, Values] = {
        "save.model": "false",
        "paths.output_dir": f"outputs/sweeps/{name}/{variant}",
        "paths.records_dir": str(records_folder(name, variant)),
    }
    if values.get("logger", "wandb") == "wandb":
        defaults["logger.group"] = f"{name}-{variant}"
    return {key: value for key, value in defaults.items() if key not in values}


def _launcher(own: Mapping[str, Values], allowed: Sequence[str] = ()) -> Launcher:
    name = str(own.get("launcher", "sequential"))
    path = config_folder() / "launcher" / f"{name}.yaml"
    if not path.is_file():
        known = options("launcher")
        raise ConfigError(
            f"launcher={name}: there is no such launcher{suggest(name, known.split(', '))}; there are {known}"
        )
    values: Any = OmegaConf.to_container(OmegaConf.load(path))
    for key, value in own.items():
        if key.startswith("launcher."):
            values[key.removeprefix("launcher.")] = _value(key, value)
    return build("launcher", values, allowed, Launcher).instance


def _allowed(values: Mapping[str, Values]) -> list[str]:
    """Return the packages of ``plugins.allow``, whose launchers may be built too."""
    if "plugins.allow" not in values:
        return []
    packages = _value("plugins.allow", values["plugins.allow"])
    return [str(package) for package in packages] if isinstance(packages, list) else []


def _value(key: str, value: Values) -> Any:
    """Parse a value of the command line as Hydra does.

    Raises:
        ConfigError: the key has several values, or none.
    """
    if isinstance(value, list | dict):
        raise ConfigError(f"{key}: a launcher's key has one value; write a list as {key}=[a,b]")
    return OverridesParser.create().parse_override(f"{key}={value}").value()


def _flag(own: Mapping[str, Values], key: str) -> bool:
    value = str(own.get(key, "false")).lower()
    if value not in ("true", "false"):
        raise ConfigError(f"{key}={value}: use true or false")
    return value == "true"


def options(group: str) -> str:
    """Return the names of the options of a config group, separated by commas."""
    return ", ".join(sorted(path.stem for path in (config_folder() / group).glob("*.yaml")))
