"""Check a composed configuration; all wrong values are reported together, before any heavy import.

The groups of plain keys become frozen, typed sections (:mod:`cfsp.config.sections`). Components with a ``_target_``
(importance, allocator, pruner, recovery, evaluators, logger) are typed by the signature of their class
(:mod:`cfsp.config.components`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import Field, PlainValidator

from cfsp.config.components import Component, build, with_key
from cfsp.config.contracts import Allocator, Evaluator, NeuronImportance, Pruner, Recovery, RunLogger
from cfsp.config.parse_calibration import parse_calibration
from cfsp.config.parse_section import parse_section
from cfsp.config.problems import shown, suggest
from cfsp.config.run_config import RunConfig
from cfsp.config.sections import (
    CalibrationSection,
    MixCalibration,
    ModelSection,
    PathsSection,
    PluginsSection,
    SaveSection,
    Section,
    SparsitySection,
    checked_force,
)
from cfsp.errors import ConfigError, printable
from cfsp.system.names import RULE, is_name
from cfsp.system.number_bounds import LARGEST_TOKENS, too_large
from cfsp.system.package import config_folder, is_packaged, package_path

_SECTIONS: dict[str, type[Section]] = {
    "model": ModelSection,
    "sparsity": SparsitySection,
    "save": SaveSection,
    "plugins": PluginsSection,
    "paths": PathsSection,
}
#: Group -> the contract that its instances fulfil.
_COMPONENTS: dict[str, type[Any]] = {
    "importance": NeuronImportance,
    "allocator": Allocator,
    "pruner": Pruner,
    "recovery": Recovery,
    "logger": RunLogger,
}
_ROOT_KEYS = {*_SECTIONS, *_COMPONENTS, "calibration", "evaluation", "seed", "force", "debug", "evaluate_selection"}


def parse(config: DictConfig | Mapping[str, Any]) -> RunConfig:
    """Check a composed configuration and build its components.

    Raises:
        ConfigError: values are wrong; one line for each finding in any section.
    """
    raw = _resolved(config)
    problems: list[str] = [
        f"{key}={shown(value)}: unknown key{suggest(root, _ROOT_KEYS)}; all keys: cfsp --cfg job"
        for root in raw
        if root not in _ROOT_KEYS
        for key, value in _leaves(str(root), raw[root])
    ]
    large = [f"{key}={shown(value)}: too large; expected at most {most:,}" for key, value, most in too_large(raw)]
    if large:  # refused before any check computes with them
        raise ConfigError(*problems, *large)
    absent = [name for name in ("model", "calibration", "sparsity", "paths") if name not in raw]
    if absent:
        raise ConfigError(
            *problems, *(f"{name} is not set: choose one, e.g. {name}={_option(name)}" for name in absent)
        )
    parts: dict[str, Any] = {}
    for name, schema in _SECTIONS.items():
        parts[name] = parse_section(name, schema, raw.get(name, {}), problems)
    parts["calibration"] = parse_calibration(raw.get("calibration", {}), problems)
    if isinstance(mixed := parts["calibration"], MixCalibration):  # records state the sources that were used
        used = {name: raw["calibration"]["sources"][name] for name in mixed.mix or () if name in mixed.sources}
        raw["calibration"] = {**raw["calibration"], "sources": used}
    allowed = parts["plugins"].allow if parts["plugins"] is not None else []
    for name, contract in _COMPONENTS.items():
        parts[name] = _component(name, raw.get(name), allowed, contract, problems)
    evaluation = _evaluators(raw.get("evaluation"), problems)
    evaluation_name = str(evaluation.pop("name", "custom"))
    problems.extend(_unsafe_names(evaluation_name, parts))
    parts["evaluation"] = {
        name: _component(f"evaluation.{name}", value, allowed, Evaluator, problems)
        for name, value in evaluation.items()
        if value is not None
    }
    problems.extend(_missing_measure_sides(parts["evaluation"]))
    for name, evaluator in parts["evaluation"].items():
        if evaluator is not None and "key" not in evaluator.settings:
            with_key(evaluator.instance, f"evaluation.{name}")
    problems.extend(_task_folders(parts["evaluation"], allowed))
    scalars = parse_section("", _Scalars, {key: raw[key] for key in _Scalars.model_fields if key in raw}, problems)
    problems.extend(_conflicts(parts, raw))
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return RunConfig(
        **parts,
        evaluation_name=evaluation_name,
        seed=scalars.seed,
        force=scalars.force is True,
        debug=scalars.debug,
        evaluate_selection=scalars.evaluate_selection,
        raw=raw,
        check_files=scalars.force == "check",
    )


def _resolved(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration as plain values, with references resolved."""
    if not isinstance(config, DictConfig):
        return dict(config)
    try:
        values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(unresolved(error)) from error
    return values


def _conflicts(parts: Mapping[str, Any], raw: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each combination of valid values that cannot work."""
    if isinstance(parts["model"], ModelSection) and not parts["model"].path:
        yield (
            f"model.path={shown(parts['model'].path)}: model={parts['model'].name} needs it: give a folder "
            "or a hub id, e.g. model.path=meta-llama/Llama-3.1-8B"
        )
    yield from _unused_choices(parts["pruner"], raw)
    if None not in (parts["pruner"], parts["importance"], parts["allocator"]):
        yield from parts["pruner"].instance.objections(parts["importance"], parts["allocator"])
    yield from _nothing_to_recover(parts["pruner"], parts["recovery"])
    yield from _nothing_to_export(parts["save"], parts["pruner"])
    yield from _too_many_tokens(parts["calibration"])


def _unsafe_names(evaluation_name: str, parts: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each name of a component that cannot be part of a file name."""
    named = {"evaluation.name": evaluation_name}
    for group in ("pruner", "recovery"):
        if parts[group] is not None:
            named[f"{group}.name"] = parts[group].instance.name
    yield from (f"{key}={shown(name)}: {RULE}" for key, name in named.items() if not is_name(name))


def unresolved(error: OmegaConfBaseException) -> str:
    """Describe a key whose value is missing (???) or refers (${...}) to a key that does not exist."""
    key = error.full_key or "configuration"
    if isinstance(error, MissingMandatoryValue):
        return f"{key}=???: has no value; give one, {key}=VALUE"
    reason = printable(str(error).partition("\n")[0])
    return f"{key}: its value refers with ${{...}} to what cannot be resolved ({reason}); write the value itself"


def _unused_choices(pruner: Component[Pruner] | None, raw: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for a chosen metric or allocator that the chosen pruner does not use."""
    if pruner is None or not pruner.instance.prunes:
        return
    for group in ("importance", "allocator"):
        if not isinstance(raw.get(group), Mapping):  # reported elsewhere
            continue
        if group not in pruner.instance.plans_with and raw.get(group) != _default(group):
            yield f"{group}._target_={shown(raw[group].get('_target_'))}: {pruner.instance.why_unused(group)}"


def _missing_measure_sides(evaluators: Mapping[str, Component[Evaluator] | None]) -> Iterator[str]:
    """Yield a line for each evaluator that states side_by_side but cannot measure sides."""
    for name, evaluator in evaluators.items():
        if evaluator is None or not evaluator.instance.side_by_side:
            continue
        if type(evaluator.instance).measure_sides is Evaluator.measure_sides:
            yield (
                f"evaluation.{name}._target_={evaluator.target}: no class for evaluation, it has side_by_side=true and "
                "no measure_sides"
            )


def _task_folders(evaluation: Mapping[str, Component[Evaluator] | None], allowed: list[str]) -> Iterator[str]:
    """Yield a line for each foreign folder of task files that plugins.allow does not permit."""
    for name, evaluator in evaluation.items():
        path = None if evaluator is None else evaluator.instance.task_folder()
        if path is not None and "tasks" not in allowed and os.path.isdir(package_path(path)) and not is_packaged(path):
            yield (
                f"evaluation.{name}.include_path={path}: task files are code (functions, templates) that would run as "
                "you; look at them, then allow it with plugins.allow=[tasks]"
            )


def _nothing_to_recover(pruner: Component[Pruner] | None, recovery: Component[Recovery] | None) -> Iterator[str]:
    if pruner is None or recovery is None or pruner.instance.prunes or not recovery.instance.trains:
        return
    yield (
        f"recovery={recovery.instance.name}: pruner={pruner.instance.name} removes nothing, so there is nothing to "
        "recover; use recovery=none, or prune in the same command (what was calibrated before is read from the cache)"
    )


def _nothing_to_export(save: SaveSection | None, pruner: Component[Pruner] | None) -> Iterator[str]:
    if save is not None and save.format != "hf" and pruner is not None and not pruner.instance.prunes:
        yield (
            f"save.format={save.format}: pruner={pruner.instance.name} removes nothing, so no model is written; leave "
            "it out, or prune; cfsp export path=FOLDER writes other forms of a pruned folder"
        )
    elif save is not None and not save.model and save.format != "hf":
        yield (
            f"save.format={save.format}: save.model=false saves no model that could be exported; use save.model=true, "
            "or leave save.format out"
        )


def _too_many_tokens(section: CalibrationSection | None) -> Iterator[str]:
    """Yield a line if the calibration set has more tokens than memory could hold."""
    if section is None or section.n_samples is None or section.seq_len is None:
        return
    if section.n_samples * section.seq_len > LARGEST_TOKENS:
        yield (
            f"calibration.n_samples={section.n_samples}: with calibration.seq_len={section.seq_len} these are "
            f"{section.n_samples * section.seq_len:,} tokens, at most {LARGEST_TOKENS:,} are taken; use fewer or "
            "shorter windows"
        )


@cache
def _default(group: str) -> dict[str, Any]:
    """Return the values of a group's default option."""
    values: Any = OmegaConf.to_container(OmegaConf.load(config_folder() / group / f"{_option(group)}.yaml"))
    return values


def _option(group: str) -> str:
    """Return the default option of a group, from config.yaml."""
    entries = OmegaConf.load(config_folder() / "config.yaml").defaults
    (option,) = [entry[group] for entry in entries if not isinstance(entry, str) and group in entry]
    return str(option)


class _Scalars(Section):
    seed: int = Field(default=0, ge=0, lt=2**32)
    force: Annotated[bool | Literal["check"], PlainValidator(checked_force)] = False
    debug: bool = False
    evaluate_selection: bool = False


def _evaluators(values: Any, problems: list[str]) -> dict[str, Any]:
    """Return the entries of the group evaluation, ``name`` among them; null means no evaluator."""
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        problems.append(
            f"evaluation={shown(values)}: a group of evaluators is expected; choose one, e.g. evaluation=none"
        )
        return {}
    if not isinstance(values.get("name", "custom"), str):
        problems.append(f"evaluation.name={shown(values['name'])}: expected text, e.g. evaluation.name=custom")
    return {str(name): value for name, value in values.items()}


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key, value


def _component(name: str, values: Any, allowed: list[str], contract: type[Any], problems: list[str]) -> Any:
    try:
        return build(name, values, allowed, contract)
    except ConfigError as error:
        problems.extend(error.problems)
        return None
