"""The typed schema of a run's configuration: every value error together, before any heavy import.

The group files under ``conf/`` are plain YAML; here they become frozen, typed sections. Components that plug
in through ``_target_`` (importance, allocator, pruner, recovery, evaluators, logger) are typed by their own
class signature: see :mod:`cfsp.components`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError

from cfsp.allocate.budget import Budget, Protect
from cfsp.components import Component, booleans_for_numbers, build, problems_of, shown, suggest
from cfsp.contracts import Allocator, Evaluator, NeuronImportance, Pruner, Recovery, RunLogger
from cfsp.errors import ConfigError
from cfsp.evaluate.values import placed
from cfsp.package import config_folder, is_packaged, package_path
from cfsp.system.answer import printable
from cfsp.system.magnitude import LARGEST_TOKENS, too_large
from cfsp.system.names import RULE, checked_name, is_name

DType = Literal["auto", "float32", "bfloat16", "float16"]
SavedDType = Literal["float32", "bfloat16", "float16"]
PositiveInt = Annotated[int, Field(ge=1, strict=True)]
Folder = Annotated[str, Field(min_length=1)]
Name = Annotated[str, AfterValidator(checked_name)]


def _device(name: str) -> str:
    # The form only: whether this machine has the device is seen when torch is there.
    if not re.fullmatch(r"auto|cpu|(cuda|mps|xpu|npu|hpu|mlu)(:\d+)?", name):
        raise ValueError("use auto, cpu, cuda, cuda:N or mps")
    return name


def _protect(value: Any) -> Protect:
    # One sentence where a union of types would give one per type.
    if value in ("none", "auto"):
        return value
    numbers = isinstance(value, list | tuple) and len(value) == 2
    if numbers and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value):
        return int(value[0]), int(value[1])
    raise ValueError("blocks that stay whole: use none, auto or [first,last], e.g. sparsity.protect=[4,2]")


def _architecture(values: dict[str, Any] | None) -> dict[str, Any] | None:
    if values is not None and not isinstance(values.get("model_type"), str):
        raise ValueError("keys of a config.json are expected, model_type among them; leave it out, or use null")
    nested = [key for key, value in (values or {}).items() if not isinstance(value, str | int | float | None)]
    if nested:
        raise ValueError(f"{', '.join(nested)}: a number, a word, true, false or null is expected")
    return values


def _batch_size(value: Any) -> int | Literal["auto"]:
    # One sentence where a union of types would give one per type.
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError("sequences at a time: give auto or a whole number from 1")


def _force(value: Any) -> bool | Literal["check"]:
    # One sentence where a union of types would give one per type.
    if value == "check" and isinstance(value, str):
        return "check"
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        raise ValueError("use false, true (repeat a finished run) or check (compare the hashes of its files)") from None


BatchSize = Annotated[int | Literal["auto"], PlainValidator(_batch_size)]
Share = Annotated[float, Field(gt=0, le=1)]
Gigabytes = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A group of keys; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    name: Name
    path: str | None = Field(description="a folder or a hub id, e.g. model=local model.path=FOLDER")
    revision: str | None = None
    dtype: DType = "auto"
    device: Annotated[str, AfterValidator(_device)] = "auto"
    trust_remote_code: bool = False
    streaming: Literal["auto", "on", "off"] = "auto"
    #: What config.json says of sizes, for ``cfsp inspect`` where neither folder nor hub is at hand; no run reads it.
    architecture: Annotated[dict[str, Any] | None, AfterValidator(_architecture)] = None
    part: Literal["whole", "language_model"] = "whole"


class HubFile(Section):
    """One file of a dataset repository on the hub (parquet or json; never a loading script)."""

    repo: str
    file: str
    revision: str | None = None


class TextSection(Section):
    """Where a text comes from and how its documents become one token stream."""

    path: str | None = Field(default=None, description="a local .txt, .jsonl, .csv or .parquet file")
    hub: HubFile | None = None
    split: str = "train"
    text_field: str = "text"
    txt_rows: Literal["whole", "lines", "wikitext"] = "whole"
    join: str = "\n\n"
    bos: Literal["auto", "none", "start", "window"] = "auto"
    skip_documents: int = Field(default=0, ge=0)
    max_documents: PositiveInt | None = None


class TextCalibration(TextSection):
    kind: Literal["text"]
    name: Name
    sampling: Literal["random", "sequential"] = "random"
    n_samples: PositiveInt
    seq_len: int = Field(ge=2)
    batch_size: BatchSize = "auto"
    memory_gb: Gigabytes | None = None
    gram_share: Share = 1.0


class TokensCalibration(Section):
    kind: Literal["tokens"]
    name: Name
    path: str | None = Field(description="a .npy file of token ids, shape [n, T]")
    n_samples: PositiveInt | None = None
    seq_len: Annotated[int, Field(ge=2)] | None = None
    batch_size: BatchSize = "auto"
    memory_gb: Gigabytes | None = None
    gram_share: Share = 1.0


class SelfCalibration(Section):
    kind: Literal["self"]
    name: Name
    n_samples: PositiveInt
    seq_len: int = Field(ge=2)
    sampling_temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    batch_size: PositiveInt = 8
    gram_share: Share = 1.0


CalibrationSection = TextCalibration | TokensCalibration | SelfCalibration
_CALIBRATION_KINDS: dict[str, type[Section]] = {
    "text": TextCalibration,
    "tokens": TokensCalibration,
    "self": SelfCalibration,
}


class SparsitySection(Section):
    ratio: float = Field(gt=0, lt=1, allow_inf_nan=False, description="the fraction to remove, e.g. sparsity.ratio=0.5")
    scope: Literal["ffn", "decoder", "model"] = "ffn"
    round_to: PositiveInt = Field(default=32, description="kept widths are multiples of it; 1 for no rounding")
    rounding: Literal["exact", "nearest"] = "exact"
    min_width: PositiveInt | None = Field(default=None, description="the smallest width of a block; null: round_to")
    protect: Annotated[Protect, PlainValidator(_protect)] = "none"


class SaveSection(Section):
    model: bool = True
    format: Literal["hf", "padded", "gguf", "decilm"] = "hf"
    dtype: SavedDType | None = None


class PluginsSection(Section):
    #: Packages; ``tasks``: the files of evaluation.*.include_path.
    allow: list[str] = Field(default=[], description="e.g. plugins.allow=[my_package]")


class PathsSection(Section):
    output_dir: Folder
    records_dir: Folder
    cache_dir: Folder


@dataclass(frozen=True)
class RunConfig:
    """A checked configuration. Components are instances; ``raw`` is the resolved configuration as given."""

    model: ModelSection
    calibration: CalibrationSection
    sparsity: SparsitySection
    importance: Component[NeuronImportance]
    allocator: Component[Allocator]
    pruner: Component[Pruner]
    recovery: Component[Recovery]
    evaluation: Mapping[str, Component[Evaluator]]
    evaluation_name: str
    logger: Component[RunLogger]
    paths: PathsSection
    save: SaveSection
    seed: int
    force: bool
    debug: bool
    evaluate_selection: bool
    raw: dict[str, Any]
    #: force=check: the hashes of a finished run's files are compared, not their sizes alone.
    check_files: bool = False

    @property
    def budget(self) -> Budget:
        return Budget(**self.sparsity.model_dump())

    @property
    def plans_with(self) -> tuple[str, ...]:
        """The groups that the pruner draws on."""
        return self.pruner.instance.plans_with


_SECTIONS: dict[str, type[Section]] = {
    "model": ModelSection,
    "sparsity": SparsitySection,
    "save": SaveSection,
    "plugins": PluginsSection,
    "paths": PathsSection,
}
#: Group -> what an instance must have to stand in it.
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
        ConfigError: with every value error of every section, one line each.
    """
    try:
        raw: Any = (
            OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
            if isinstance(config, DictConfig)
            else dict(config)
        )
    except OmegaConfBaseException as error:
        raise ConfigError(unresolved(error)) from error
    problems: list[str] = [
        f"{key}={shown(value)}: unknown key{suggest(root, _ROOT_KEYS)}; all keys: cfsp --cfg job"
        for root in raw
        if root not in _ROOT_KEYS
        for key, value in _leaves(str(root), raw[root])
    ]
    large = [f"{key}={shown(value)}: too large; expected at most {most:,}" for key, value, most in too_large(raw)]
    if large:  # before they are computed with
        raise ConfigError(*problems, *large)
    absent = [name for name in ("model", "calibration", "sparsity", "paths") if name not in raw]
    if absent:
        raise ConfigError(
            *problems, *(f"{name} is not set: choose one, e.g. {name}={_option(name)}" for name in absent)
        )
    parts: dict[str, Any] = {}
    for name, schema in _SECTIONS.items():
        parts[name] = _section(name, schema, raw.get(name, {}), problems)
    parts["calibration"] = _calibration(raw.get("calibration", {}), problems)
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
    problems.extend(_no_sides(parts["evaluation"]))
    for name, evaluator in parts["evaluation"].items():
        if evaluator is not None and "key" not in evaluator.settings:
            placed(evaluator.instance, f"evaluation.{name}")
    problems.extend(_task_folders(parts["evaluation"], allowed))
    scalars = _section("", _Scalars, {key: raw[key] for key in _Scalars.model_fields if key in raw}, problems)
    if isinstance(parts["model"], ModelSection) and not parts["model"].path:
        problems.append(
            f"model.path={shown(parts['model'].path)}: model={parts['model'].name} needs it: give a folder "
            "or a hub id, e.g. model.path=meta-llama/Llama-3.1-8B"
        )
    problems.extend(_unused(parts["pruner"], raw))
    if None not in (parts["pruner"], parts["importance"], parts["allocator"]):
        problems.extend(parts["pruner"].instance.objections(parts["importance"], parts["allocator"]))
    problems.extend(_nothing_to_recover(parts["pruner"], parts["recovery"]))
    problems.extend(_nothing_to_export(parts["save"], parts["pruner"]))
    problems.extend(_too_many_tokens(parts["calibration"]))
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    parts.pop("plugins")
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


def _unsafe_names(evaluation_name: str, parts: Mapping[str, Any]) -> Iterator[str]:
    """Names that components carry go into names of files, as those of the sections do."""
    named = {"evaluation.name": evaluation_name}
    for group in ("pruner", "recovery"):
        if parts[group] is not None:
            named[f"{group}.name"] = parts[group].instance.name
    yield from (f"{key}={shown(name)}: {RULE}" for key, name in named.items() if not is_name(name))


def unresolved(error: OmegaConfBaseException) -> str:
    """The line about a key whose value is missing (???) or refers (${...}) to what is not there."""
    key = error.full_key or "configuration"
    if isinstance(error, MissingMandatoryValue):
        return f"{key}=???: has no value; give one, {key}=VALUE"
    reason = printable(str(error).partition("\n")[0])
    return f"{key}: its value refers with ${{...}} to what cannot be resolved ({reason}); write the value itself"


def _unused(pruner: Component[Pruner] | None, raw: Mapping[str, Any]) -> Iterator[str]:
    """Refuse a metric or allocator that was chosen, but that the chosen pruner does not look at."""
    if pruner is None or not pruner.instance.prunes:
        return
    for group in ("importance", "allocator"):
        if not isinstance(raw.get(group), Mapping):  # a problem of its own
            continue
        if group not in pruner.instance.plans_with and raw.get(group) != _default(group):
            yield f"{group}._target_={shown(raw[group].get('_target_'))}: {pruner.instance.why_unused(group)}"


def _no_sides(evaluators: Mapping[str, Component[Evaluator] | None]) -> Iterator[str]:
    """Refuse an evaluator that is to measure side by side and cannot."""
    for name, evaluator in evaluators.items():
        if evaluator is None or not evaluator.instance.side_by_side:
            continue
        if type(evaluator.instance).measure_sides is Evaluator.measure_sides:
            yield (
                f"evaluation.{name}._target_={evaluator.target}: no class for evaluation, it has side_by_side=true and "
                "no measure_sides"
            )


def _task_folders(evaluation: Mapping[str, Component[Evaluator] | None], allowed: list[str]) -> Iterator[str]:
    """Folders of task files that are not cfsp's own, without the word that lets them run."""
    for name, evaluator in evaluation.items():
        path = None if evaluator is None else evaluator.instance.task_folder()
        if path is not None and "tasks" not in allowed and package_path(path).is_dir() and not is_packaged(path):
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
    """More windows than memory could hold, seen before anything is read."""
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
    """The group as config.yaml has it where nobody chooses."""
    values: Any = OmegaConf.to_container(OmegaConf.load(config_folder() / group / f"{_option(group)}.yaml"))
    return values


def _option(group: str) -> str:
    """The option of a group that config.yaml chooses."""
    entries = OmegaConf.load(config_folder() / "config.yaml").defaults
    (option,) = [entry[group] for entry in entries if not isinstance(entry, str) and group in entry]
    return str(option)


class _Scalars(Section):
    seed: int = Field(default=0, ge=0, lt=2**32)
    force: Annotated[bool | Literal["check"], PlainValidator(_force)] = False
    debug: bool = False
    evaluate_selection: bool = False


def _section(name: str, schema: type[Section], values: Any, problems: list[str]) -> Any:
    if not isinstance(values, Mapping):
        problems.append(
            f"{name}={shown(values)}: a group of keys is expected: {', '.join(schema.model_fields)}; leave {name} out "
            f"for its defaults, or write {name}.KEY=VALUE"
        )
        return None
    wrong = [*booleans_for_numbers(schema, values, name)]
    if wrong:
        problems.extend(wrong)
        return None
    try:
        return schema(**{str(key): value for key, value in values.items()})
    except ValidationError as error:
        problems.extend(problems_of(error, name, schema))
        return None


def _calibration(values: Mapping[str, Any], problems: list[str]) -> Any:
    if not isinstance(values, Mapping):
        problems.append(f"calibration={shown(values)}: a group of keys is expected; choose one, e.g. calibration=text")
        return None
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in _CALIBRATION_KINDS:
        problems.append(f"calibration.kind={shown(kind)}: use {', '.join(_CALIBRATION_KINDS)}")
        return None
    section = _section("calibration", _CALIBRATION_KINDS[kind], values, problems)
    if isinstance(section, TextCalibration) and section.path is None and section.hub is None:
        problems.append(
            f"calibration.path=null: calibration={section.name} has no copy on the hub: "
            "give a local .txt, .jsonl or .parquet file, calibration.path=FILE"
        )
    if isinstance(section, TokensCalibration) and section.path is None:
        problems.append(
            "calibration.path=null: calibration=tokens needs it: give a .npy file of ids, calibration.path=FILE.npy"
        )
    return section


def _evaluators(values: Any, problems: list[str]) -> dict[str, Any]:
    """The entries of the evaluation, ``name`` among them; null stands for none."""
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
