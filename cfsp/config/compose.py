"""Compose the configuration outside the command line, and explain overrides that Hydra refuses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from cfsp.config.problems import shown, suggest
from cfsp.errors import ConfigError, printable
from cfsp.system.override_check import check_overrides
from cfsp.system.package import config_folder

#: Groups that describe a sweep and not a run.
SWEEP_GROUPS = ("experiment", "launcher")


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """Compose the configuration of ``cfsp OVERRIDES``, also from within a running Hydra application.

    Raises:
        ConfigError: an override is malformed, or a key, a group or an option is unknown.
    """
    check_overrides(overrides)
    try:
        return _compose(overrides)
    except Exception as error:  # Hydra raises many classes for malformed overrides, TypeError among them
        raise explain(error, overrides) from error


def explain(
    error: Exception, overrides: Sequence[str], folder: Path | None = None, *, sweep: bool = False
) -> ConfigError:
    """Explain why Hydra refused a command line, with one line for each finding.

    Hydra stops at the first override that it cannot apply and reports it in many lines. This function checks every
    override.

    Args:
        error: error of Hydra.
        overrides: overrides of the command line, as given.
        folder: folder with further groups and options, from ``--config-dir``.
        sweep: whether it is the command line of a multirun, in which a key may have several values.
    """
    folders = [config_folder(), *([folder] if folder is not None and folder.is_dir() else [])]
    problems = list(_findings(overrides, folders, sweep=sweep))
    return ConfigError(*problems) if problems else ConfigError(_hydra_reason(error, overrides))


def _hydra_reason(error: Exception, overrides: Sequence[str]) -> str:
    """Return Hydra's message on one line, with the override that caused it if exactly one matches."""
    reason = printable(str(error).partition("Config search path")[0]) or type(error).__name__
    reason = re.sub(r"^In '[^']*': ", "", reason)
    reason = reason.replace(
        "Config group override must be a string or a list. Got", "one option is expected, not of kind"
    )
    merged = re.match(r"Error merging override (\S.*)", reason)
    if merged:
        group = "hydra" if merged[1].lstrip("+~").startswith("hydra") else "job"
        return f"{merged[1]}: a value of another kind stands there; write one like it (all keys: cfsp --cfg {group})"
    absent = re.match(r"Could not override '([^']*)'", reason)
    if absent:
        return f"{absent[1]}: there is no such key, or it takes no such value; all keys: cfsp --cfg job"
    causes = [text for text in overrides if text in reason or _key_of(text) in reason]
    if len(causes) != 1 or causes[0] in reason:
        return f"{reason}; all keys: cfsp --cfg job"
    return f"{causes[0]}: not applied ({reason}); all keys: cfsp --cfg job"


def _key_of(text: str) -> str:
    return text.partition("=")[0].lstrip("+~") or text


def _compose(overrides: Sequence[str]) -> DictConfig:
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_folder().resolve()), version_base="1.3"):
            return hydra_compose("config", overrides=list(overrides))
    finally:
        GlobalHydra.instance().hydra = outer


def _findings(overrides: Sequence[str], folders: Sequence[Path], *, sweep: bool) -> Iterator[str]:
    parser, malformed, choices, values = OverridesParser.create(), [], [], []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except Exception:  # a RecursionError among them
            malformed.append(text)
            continue
        key = override.key_or_group
        if not key:
            malformed.append(text)
        elif key in SWEEP_GROUPS:
            yield f"{text}: this is a sweep's, not one run's: cfsp sweep {text}"
        elif _options(key, folders):
            problem = _option_problem(override, sorted(_options(key, folders)))
            if problem is None and override.is_sweep_override() and not sweep:
                problem = f"{text}: several options need a sweep: add -m (one run each)"
            if problem is None:
                choices.append(text)
            else:
                yield problem
        elif key.split(".", 1)[0].split("/", 1)[0] != "hydra":
            values.append(override)
    tree = _tree(choices, folders)
    for text in malformed:
        key = text.partition("=")[0]
        meant = "" if _exists(tree, key) else _nearest(key, _keys(tree))
        yield f"{text}: not a valid override{meant}; {_way_out(text, parser)}"
    for override in values:
        key, misplaced = override.key_or_group, _kind_problem(override, tree)
        if misplaced is not None:
            yield misplaced
        elif key.startswith("paths.") and not override.is_delete() and override.value() is None:
            yield f"{override.input_line}: expected a folder; leave the key out for its default"
        elif override.is_sweep_override() and not override.is_discrete_sweep():
            yield f"{override.input_line}: a sweep needs its values: write {key}=a,b,c or {key}=range(FIRST,END,STEP)"
        elif not override.is_add() and not override.is_force_add() and not _exists(tree, key):
            yield _unknown_key(key, tree, folders)
        elif override.is_sweep_override() and not sweep:
            value = str(override.input_line).partition("=")[2]
            yield (
                f"{override.input_line}: several values need a sweep: add -m (one run each); for one list "
                f"write {key}=[{value}]"
            )


def _kind_problem(override: Override, tree: Any) -> str | None:
    """Return a line on a value whose kind cannot take the place of what stands there: keys, a list or one value."""
    key, line = override.key_or_group, override.input_line
    node, value, known = _value_at(tree, key), override.value(), not (override.is_add() or override.is_force_add())
    unknown = known and isinstance(value, Mapping) and isinstance(node, Mapping) and not set(value) <= set(node)
    if isinstance(node, Mapping) and (isinstance(value, list) or unknown):
        return f"{line}: a group of keys is expected: {', '.join(node)}; write {key}.KEY=VALUE"
    if isinstance(node, list) and isinstance(value, Mapping):
        return f"{line}: a list is expected; write {key}=[A,B]"
    parents = [at for at, letter in enumerate(key) if letter == "."]
    for at in parents:
        parent, rest = key[:at], key[at + 1 :]
        if _exists(tree, parent) and not isinstance(_value_at(tree, parent), Mapping | list):
            found = shown(_value_at(tree, parent))
            remedy = f"write {parent}=VALUE, or {parent}={{{rest}:VALUE}} where it takes keys"
            return f"{line}: {parent} is {found} and has no keys; {remedy}"
    return None


def _option_problem(override: Override, options: Sequence[str]) -> str | None:
    group = override.key_or_group
    if isinstance(override.value(), list):
        return f"{override.input_line}: one option is expected; several need a sweep: -m {group}=A,B (one run each)"
    if override.is_delete() or (override.is_sweep_override() and not override.is_discrete_sweep()):
        return None
    chosen = [*override.sweep_string_iterator()] if override.is_sweep_override() else [shown(override.value())]
    unknown = [option for option in chosen if option not in options]
    if unknown:
        empty = unknown[0] in ("null", "''") and "none" in options
        near = "; did you mean none?" if empty else suggest(unknown[0], options)
        return f"{group}={unknown[0]}: there is no such option{near}; options: {', '.join(options)}"
    if override.is_add():
        return f"{override.input_line}: {group} is chosen already; write {group}={chosen[0]} without the +"
    return None


def _options(group: str, folders: Sequence[Path]) -> dict[str, Path]:
    return {path.stem: path for folder in folders for path in sorted((folder / group).glob("*.yaml")) if group != "."}


def _tree(choices: Sequence[str], folders: Sequence[Path]) -> Any:
    """Return the whole configuration with the chosen options of groups; references stay unresolved."""
    single = [text for text in choices if "," not in text]
    search = [f"hydra.searchpath=[{','.join(f'file://{folder.resolve()}' for folder in folders[1:])}]"]
    try:
        return OmegaConf.to_container(_compose([*single, *search]), resolve=False)
    except Exception:  # the choices themselves are wrong
        return OmegaConf.to_container(_compose([]), resolve=False)


def _unknown_key(key: str, tree: Any, folders: Sequence[Path]) -> str:
    group, _, rest = key.partition(".")
    contents = {option: _content(path, group) for option, path in _options(group, folders).items()} if rest else {}
    options_with_key = [f"{group}={option}" for option, content in contents.items() if _exists(content, rest)]
    if options_with_key:
        return f"{key}: there is no such key here; there is with {' or '.join(options_with_key)}"
    near = _nearest(key, [name for name in _keys(tree) if "." in name or not rest])
    for option, content in contents.items():
        near = near or _nearest(rest, _keys(content), f"{group}.", f" with {group}={option}")
    return f"{key}: there is no such key{near}; all keys: cfsp --cfg job"


def _content(path: Path, group: str) -> Any:
    """Return the keys of an option from its file, the options that it inherits from, and its nested options.

    A preset (package _global_) holds the keys of its group one level deeper.
    """
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    if not isinstance(content, dict):
        return {}
    for entry in content.get("defaults", ()):
        if isinstance(entry, str) and (path.parent / f"{entry}.yaml").is_file():
            content = _content(path.parent / f"{entry}.yaml", group) | content
            continue
        for inner, option in entry.items() if isinstance(entry, Mapping) else ():
            part = path.parent / str(inner) / f"{option}.yaml"
            if part.is_file():
                package = re.search(r"^# @package (\S+)", part.read_text(encoding="utf-8"))
                within = package.group(1).removeprefix(group).strip(".") if package else inner
                keys = _content(part, f"{group}/{inner}")
                content |= {within: keys} if within else keys
    return content.get(group, content)


def _nearest(key: str, known: Iterable[str], prefix: str = "", suffix: str = "") -> str:
    """Suggest the known key that ``key`` misspells or that ends in it: ``sparsity.ratio`` for ``ratio``."""
    known = list(known)
    leaf = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == leaf]
    near = next(iter(get_close_matches(key, same, n=1, cutoff=0) or get_close_matches(key, known, n=1)), None)
    if near is None:
        leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
        near = next((leaves[name] for name in get_close_matches(leaf, leaves, n=1, cutoff=0.6)), None)
    return f"; did you mean {prefix}{near}{suffix}?" if near else ""


def _way_out(text: str, parser: OverridesParser) -> str:
    """Describe how to write an override that Hydra cannot parse; suggest quotes only if Hydra parses it with them."""
    key, equals, value = text.partition("=")
    if re.match(r"(range|choice|interval|glob|sort|shuffle|tag)\(", value):
        return "a sweep is written with -m as key=a,b,c, key=range(FIRST,END,STEP) or key=choice(a,b)"
    bare = value.strip("'\"")
    for mark in ("'", '\\"'):
        quote = mark[-1]
        quoted = f"{key}={quote}{bare}{quote}"
        if (
            equals
            and re.fullmatch(r"[~+]*[\w./@-]+", key)
            and bare
            and quote not in bare
            and not re.match(r"[\[{]", value)
        ):
            try:
                parser.parse_override(quoted)
            except (HydraException, ValueError):
                continue
            return f'this value needs quotes: "{key}={mark}{bare}{mark}"'
    return "write key=value (quote values with , = # ( ' ~ or spaces: \"key='value'\")"


def _value_at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _exists(tree: Any, key: str) -> bool:
    for part in key.split("."):
        if tree is None:
            return True
        if not isinstance(tree, Mapping) or part not in tree:
            return False
        tree = tree[part]
    return True


def _keys(values: Any, prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if key in ("_target_", "defaults"):
            continue
        yield prefix + str(key)
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{key}.")
