"""Every option of every group composes and instantiates; schemas and YAML files hold the same keys."""

from __future__ import annotations

import ast
import dataclasses
import typing
from functools import cache
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from cfsp.config import parse as schema
from cfsp.config import sections
from cfsp.config.compose import SWEEP_GROUPS, compose
from cfsp.config.parse import parse
from cfsp.config.run_config import RunConfig
from cfsp.config.sections import Section, TextSection
from cfsp.system.package import ROOT, config_folder

#: What an option cannot do without.
REQUIRED = {
    "model=local": ["model.path=FOLDER"],
    "calibration=text": ["calibration.path=FILE.txt"],
    "calibration=ptb": ["calibration.path=FILE.txt"],
    "calibration=llm_pruner": ["calibration.path=FILE.txt"],
    "calibration=tokens": ["calibration.path=FILE.npy"],
    "calibration=mix": ["calibration.mix={bundled: 1}"],
}
#: Groups within a group, and what an option of theirs needs beside it.
NESTED = {
    "recovery/data": {"text": ["recovery.data.path=FILE.txt"], "instructions": ["recovery.data.path=FILE.jsonl"]},
    "recovery/recipe": {},
}
#: Groups that other files of conf/ draw on; nobody chooses an option of theirs.
PARTS = {"text"}
#: ``kind`` chooses the schema. The others state what is done: one value is allowed, and no branch reads it.
STATED = {"kind", "structure", "compensation", "sequential", "format"}

GROUPS = sorted(
    path.name for path in config_folder().iterdir() if path.is_dir() and path.name not in {*PARTS, *SWEEP_GROUPS}
)
OPTIONS = [f"{group}={path.stem}" for group in GROUPS for path in sorted((config_folder() / group).glob("*.yaml"))]


@cache
def _composed(*words: str) -> DictConfig:
    return compose([*(extra for word in words for extra in REQUIRED.get(word, [])), *words])


@cache
def _parsed(*words: str) -> RunConfig:
    return parse(_composed(*words))


def test_the_groups_of_the_design_are_there():
    wanted = {"model", "calibration", "sparsity", "importance", "allocator", "pruner", "recovery"}
    assert wanted | {"evaluation", "logger", "paths"} <= set(GROUPS)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_checks_and_instantiates(option):
    group, _, name = option.partition("=")
    found = _parsed(option)
    part = getattr(found, group)
    if group in ("model", "calibration"):
        assert part.name == name
    elif group == "pruner":
        assert part.instance.name == name
    elif group == "evaluation":
        assert found.evaluation_name == name
        assert all(evaluator.instance for evaluator in part.values())


@pytest.mark.parametrize("recovery", ["lora", "full"])
@pytest.mark.parametrize(
    ("group", "name"),
    [(group, path.stem) for group in NESTED for path in sorted((config_folder() / group).glob("*.yaml"))],
)
def test_every_recipe_and_data_set_goes_with_every_training(recovery, group, name):
    found = _parsed(f"recovery={recovery}", f"{group}={name}", *NESTED[group].get(name, ())).recovery.instance
    if group == "recovery/data":
        assert found.data.name == name
    assert found.name == recovery


def test_the_published_recipe():
    found = _parsed("recovery=ig_lora", "recovery/recipe=alpaca").recovery.instance
    assert (found.rank, found.alpha, found.dropout, found.ranks) == (8, 16, 0.05, "importance")
    assert (found.epochs, found.max_steps, found.learning_rate, found.warmup_steps) == (2, None, 1e-4, 100)
    assert (found.batch_size, found.cutoff, found.response_only, found.objective) == (64, 256, True, "lm")
    assert (found.data.hub.repo, found.data.n_samples) == ("yahma/alpaca-cleaned", 50_000)


def test_both_recipes_hold_the_same_keys_and_so_do_all_data_sets():
    for group in NESTED:
        keys = [set(_yaml(group, path.stem)) for path in (config_folder() / group).glob("*.yaml")]
        assert all(one == keys[0] for one in keys)


@pytest.mark.parametrize(
    ("pruner", "importance", "allocator"),
    [
        ("cfsp", "Cfsp", "Coarse"),
        ("uniform", "Cfsp", "Uniform"),
        ("magnitude_sp", "Magnitude", "Uniform"),
        ("wanda_sp", "Wanda", "GlobalRank"),
        ("random", "RandomImportance", "Uniform"),
        ("modegpt_ffn", "Leverage", "BlockInfluence"),
    ],
)
def test_a_preset_is_a_metric_and_an_allocator(pruner, importance, allocator):
    found = _parsed(f"pruner={pruner}")
    assert type(found.importance.instance).__name__ == importance
    assert type(found.allocator.instance).__name__ == allocator


@pytest.mark.parametrize(
    ("words", "importance", "allocator"),
    [
        (["pruner=uniform", "importance=magnitude"], "Magnitude", "Uniform"),
        (["importance=magnitude", "pruner=uniform"], "Magnitude", "Uniform"),
        (["pruner=uniform", "allocator=coarse"], "Cfsp", "Coarse"),
        (["pruner=wanda_sp", "allocator=coarse", "allocator.metric=mae"], "Wanda", "Coarse"),
        (
            ["pruner=random", "importance=cfsp_released", "importance.variant=one_a"],
            "CfspReleased",
            "Uniform",
        ),
    ],
    ids=" ".join,
)
def test_the_command_line_beats_a_preset(words, importance, allocator):
    found = _parsed(*words)
    assert type(found.importance.instance).__name__ == importance
    assert type(found.allocator.instance).__name__ == allocator
    for word in words:
        key, _, value = word.partition("=")
        if "." in key:
            group, _, setting = key.partition(".")
            assert getattr(getattr(found, group).instance, setting) == value


def test_the_seed_reaches_what_is_random():
    assert _parsed("pruner=random", "seed=7").importance.instance.seed == 7


# Keys


def _sections() -> list[tuple[str, type[Section], set[str]]]:
    """(where, schema, keys in the YAML) of every typed section."""
    found = []
    for option in OPTIONS:
        group = option.partition("=")[0]
        if group in ("model", "sparsity", "paths", "calibration"):
            values = _yaml(group, option.partition("=")[2])
            kind = sections.CALIBRATION_KINDS[values["kind"]] if group == "calibration" else schema._SECTIONS[group]
            found.append((option, kind, set(values)))
    root = _yaml("", "config")
    found += [(name, schema._SECTIONS[name], set(root[name])) for name in ("save", "plugins")]
    found += [(f"text {name}", TextSection, set(values)) for name, values in _yaml("text", "published").items()]
    return found


def _yaml(group: str, option: str) -> dict[str, typing.Any]:
    """Load a file with the options that it inherits from: collecting the tests must not cost a composition each."""
    content = OmegaConf.to_container(OmegaConf.load(config_folder() / group / f"{option}.yaml"), resolve=False)
    assert isinstance(content, dict)
    defaults = content.pop("defaults", ())
    bases = [entry for entry in defaults if isinstance(entry, str) and entry != "_self_"]
    inherited = {key: value for base in bases if "@" not in base for key, value in _yaml(group, base).items()}
    placed = [entry.partition("@") for entry in defaults if isinstance(entry, str) and "@" in entry]
    inside = {place.partition(".")[0]: {} for _, _, place in placed}
    return inherited | inside | {str(key): value for key, value in content.items()}


@pytest.mark.parametrize(("where", "kind", "keys"), [pytest.param(*row, id=row[0]) for row in _sections()])
def test_a_section_and_its_yaml_hold_the_same_keys(where, kind, keys):
    assert keys == set(kind.model_fields)


def test_the_root_keys_are_all_in_config_yaml():
    assert set(_composed()) == schema._ROOT_KEYS
    assert set(schema._Scalars.model_fields) == {"seed", "force", "debug", "evaluate_selection"}


def _component_options() -> list[str]:
    return [option for option in OPTIONS if option.partition("=")[0] in schema._COMPONENTS]


@pytest.mark.parametrize("option", [*_component_options(), *(o for o in OPTIONS if o.startswith("evaluation="))])
def test_a_component_and_its_yaml_hold_the_same_keys(option):
    group = option.partition("=")[0]
    values = OmegaConf.to_container(_composed(option)[group], resolve=False)
    found = getattr(_parsed(option), group)
    pairs = [(values, found)] if group != "evaluation" else [(values[name], part) for name, part in found.items()]
    for given, part in pairs:
        assert set(given) - {"_target_"} == {field.name for field in dataclasses.fields(part.instance)}


def _attributes() -> set[str]:
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py"))
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_every_key_is_read_somewhere():
    kinds: list[type] = [
        *schema._SECTIONS.values(),
        *sections.CALIBRATION_KINDS.values(),
        sections.HubFile,
        schema._Scalars,
    ]
    keys = {key for kind in kinds for key in typing.cast(type[Section], kind).model_fields}
    for option in OPTIONS:
        if option.partition("=")[0] in (*schema._COMPONENTS, "evaluation"):
            part = getattr(_parsed(option), option.partition("=")[0])
            for component in part.values() if isinstance(part, dict) else [part]:
                keys |= {field.name for field in dataclasses.fields(component.instance)}
    assert keys - _attributes() - STATED == set()


def test_every_yaml_of_the_configuration_is_reached():
    """No file lies outside a group, and no group is left out of the defaults list."""
    loose = {path.name for path in Path(config_folder()).glob("*.yaml")}
    assert loose == {"config.yaml"}
    defaults = OmegaConf.load(config_folder() / "config.yaml").defaults
    chosen = {key for entry in defaults if not isinstance(entry, str) for key in entry}
    assert set(GROUPS) <= {key.removeprefix("optional ") for key in chosen}
    order = [next(iter(entry)) if not isinstance(entry, str) else entry for entry in defaults]
    assert order[0] == "_self_"
    assert order.index("pruner") > max(order.index(group) for group in ("importance", "allocator", "sparsity"))
