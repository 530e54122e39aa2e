"""The registry: a ``_target_`` and its keys become an instance of that class, typed by the class signature.

A new metric, allocator, recovery, evaluator or logger is one class (a pydantic dataclass: :func:`component`)
and one YAML file; nothing central is edited. Within cfsp only classes that are defined here and marked with
:func:`component` are built; classes that other packages define run foreign code, so each of these packages stands in
``plugins.allow=[package]``.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, ClassVar, Generic, Literal, TypeVar, dataclass_transform, get_args, get_origin

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from cfsp.config.contracts import optional_members, required_members
from cfsp.errors import ConfigError, printable
from cfsp.system.expected import Expected, expected_at, fields_of, takes_numbers_only
from cfsp.system.package import config_folder

_T = TypeVar("_T")
#: The contract that an instance fulfils (:mod:`cfsp.config.contracts`).
Contract = TypeVar("Contract", covariant=True)
#: Attribute of the classes that :func:`component` decorates; subclasses do not inherit the permission.
_MARK = "__cfsp_component__"
#: Keys of an identity that name a component; the others are its settings.
NAMING = ("component", "class", "source")


@dataclass_transform(frozen_default=True)
def component(cls: type[_T]) -> type[_T]:
    """Decorate a pluggable class: frozen, typed, unknown keys are errors, and a ``_target_`` may name it."""
    decorated: Any = pydantic_dataclass(cls, frozen=True, config=ConfigDict(extra="forbid"))
    setattr(decorated, _MARK, True)
    return decorated


@dataclass(frozen=True)
class Component(Generic[Contract]):
    """An instance together with the configuration it was built from (which goes to the record)."""

    instance: Contract
    target: str
    settings: dict[str, Any]

    def identity(self) -> dict[str, Any]:
        """Return what of this component decides a result: its name, every setting, and the code of a foreign class.

        A component of cfsp is named without its module, so that code can move; its code is covered by the version of
        the methods (:data:`cfsp.config.identity.METHOD_VERSION`). A class outside cfsp is named by its path, and the
        digest of its source stands beside it.
        """
        name = component_name(self.target)
        if name is not None:
            return {"component": name, **self.settings}
        return {"class": self.target, "source": _source_digest(self.instance), **self.settings}


def component_name(target: str) -> str | None:
    """Return the name of a component of cfsp, independent of its module; None for a class outside cfsp.

    Args:
        target: ``_target_``, e.g. ``cfsp.importance.cfsp_released.CfspReleased``, whose name is ``cfsp_released``.
    """
    if not target.startswith("cfsp."):
        return None
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", target.rpartition(".")[2])
    return words.lower()


def _source_digest(instance: Any) -> str | None:
    """sha256 of the module that defines the class; None where it has no source file."""
    try:
        source = inspect.getsource(inspect.getmodule(type(instance)))  # type: ignore[arg-type]
    except (OSError, TypeError):
        return None
    return hashlib.sha256(source.encode()).hexdigest()


def build(name: str, values: Any, allowed: Iterable[str] = (), contract: type[Any] | None = None) -> Component[Any]:
    """Instantiate the component of configuration group ``name``.

    Args:
        allowed: packages outside cfsp that a ``_target_`` may name.
        contract: protocol of :mod:`cfsp.config.contracts` that the instance has to fulfil. Members that it requires
            must be there; for the others the class gets the defaults of the contract where it has none of its own.

    Raises:
        ConfigError: no ``_target_``, a target that is not allowed, does not exist or is of another kind, or
            wrong settings.
    """
    if not isinstance(values, Mapping) or not values.get("_target_"):
        way_out = f"null leaves it out, {name}.KEY=VALUE sets a key" if "." in name else f"e.g. {name}=OPTION"
        raise ConfigError(f"{name}={shown(values)}: a group with a _target_ class is expected; {way_out}")
    settings = {str(key): value for key, value in values.items() if key != "_target_"}
    if not isinstance(values["_target_"], str) or not re.fullmatch(r"[^\W\d][\w.]{0,300}", values["_target_"]):
        raise ConfigError(f"{name}._target_={shown(values['_target_'])}: expected the name of a class, module.Class")
    target = values["_target_"]
    cls = _resolve(name, target, allowed)
    needs = () if contract is None else required_members(contract)
    _check_attributes(name, target, cls, needs)
    wrong = [*booleans_for_numbers(cls, settings, name)]
    if wrong:
        raise ConfigError(*wrong)
    if contract is not None:
        cls = _with_defaults(cls, contract)
    try:
        instance = cls(**settings)
    except ValidationError as error:
        raise ConfigError(*problems_of(error, name, cls)) from error
    except TypeError as error:
        raise ConfigError(f"{name}: {target} does not accept these keys: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
    _check_attributes(name, target, instance, needs)
    known = asdict(instance) if hasattr(instance, "__dataclass_fields__") else settings
    return Component(instance, target, known)


def _with_defaults(cls: type, contract: type[Any]) -> type:
    """Return a subclass that has the optional members of ``contract`` which ``cls`` lacks; ``cls`` where none is."""
    declared = getattr(cls, "__dataclass_fields__", {})
    lacking = {
        member: default
        for member, default in optional_members(contract).items()
        if not hasattr(cls, member) and member not in declared
    }
    if not lacking:
        return cls
    described: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    described["__annotations__"] = dict.fromkeys(lacking, ClassVar)
    return type(cls)(cls.__name__, (cls,), described | lacking)


def _check_attributes(name: str, target: str, candidate: Any, needs: Iterable[str]) -> None:
    """Refuse what cannot stand in the group: a class of cfsp before it is called, any instance afterwards.

    A class of somebody else may give its instances what they need, so its class alone decides nothing.
    """
    abstract = getattr(candidate, "__abstractmethods__", ()) if isinstance(candidate, type) else ()
    lacking = [attribute for attribute in needs if attribute in abstract]
    if not isinstance(candidate, type) or _is_component(candidate):
        declared = getattr(candidate, "__dataclass_fields__", {})
        lacking += [attribute for attribute in needs if not hasattr(candidate, attribute) and attribute not in declared]
    if lacking:
        group = name.split(".", 1)[0]
        raise ConfigError(f"{name}._target_={target}: no class for {group}, it has no {', '.join(lacking)}")


def _is_component(cls: type) -> bool:
    """Whether cfsp itself defines the class, and marks this very one as pluggable."""
    return _package(cls.__module__) == "cfsp" and _MARK in vars(cls)


def _package(dotted: str) -> str:
    return dotted.partition(".")[0]


def _resolve(name: str, target: str, allowed: Iterable[str]) -> type:
    """Find the class of a ``_target_``; nothing is called, and no module outside cfsp and ``allowed`` is imported.

    Raises:
        ConfigError: no such class, one of cfsp that is no component, or one that a package defines which is not
            allowed: the package that the target names and the one that the class is from both have to be.
    """
    module_name, _, class_name = target.rpartition(".")
    packages = {"cfsp", *allowed}
    if _package(target) not in packages:
        raise ConfigError(
            f"{name}._target_={target}: classes outside cfsp run foreign code; allow it with "
            f"plugins.allow=[{_package(target)}]"
        )
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # a module of the user's may fail in any way while it is imported
        reason = printable(str(error)) or type(error).__name__
        raise ConfigError(
            f"{name}._target_={target}: there is no such class ({reason}){suggest(target, _known_targets())}"
        ) from error
    if not isinstance(found, type):
        raise ConfigError(f"{name}._target_={target}: a class is needed, this is a {type(found).__name__}")
    defined_in = _package(found.__module__)
    if _is_component(found) or (defined_in != "cfsp" and _package(target) != "cfsp" and defined_in in packages):
        return found
    if defined_in == "cfsp" or _package(target) == "cfsp":
        group = name.split(".", 1)[0]
        raise ConfigError(
            f"{name}._target_={target}: this is no class to plug in{suggest(target, _known_targets())}; choose one "
            f"with {group}=OPTION"
        )
    raise ConfigError(
        f"{name}._target_={target}: this class is defined in {found.__module__}; to run the code of both packages give "
        f"plugins.allow=[{','.join(sorted({_package(target), defined_in}))}]"
    )


def known_class(target: str) -> type | None:
    """Return the class that a ``_target_`` names where it is cfsp's, or in a module that was imported already.

    For the settings of earlier runs: reading a record imports no foreign code.
    """
    module_name, _, class_name = target.rpartition(".")
    if _package(target) == "cfsp":
        try:
            importlib.import_module(module_name)
        except ImportError:
            return None
    cls = getattr(sys.modules.get(module_name), class_name, None)
    return cls if isinstance(cls, type) else None


def option_of(group: str, instance: object) -> str:
    """Return the words that choose the class of ``instance``: ``group=OPTION``, or ``group._target_=CLASS``."""
    target = f"{type(instance).__module__}.{type(instance).__qualname__}"
    for path in sorted((config_folder() / group).glob("*.yaml")):
        if re.search(rf"^_target_:\s*{re.escape(target)}\s*$", path.read_text(encoding="utf-8"), re.MULTILINE):
            return f"{group}={path.stem}"
    return f"{group}._target_={target}"


def _known_targets() -> set[str]:
    """The classes that the configuration files name."""
    texts = (path.read_text(encoding="utf-8") for path in config_folder().rglob("*.yaml"))
    return {target for text in texts for target in re.findall(r"^\s*_target_:\s*(\S+)", text, re.MULTILINE)}


def problems_of(error: ValidationError, prefix: str, schema: type) -> list[str]:
    """One line per key: its value, what it takes and an example; never the words of the validator.

    Messages of our own checks (a ``ValueError`` in a validator) stand as they are.
    """
    lines: dict[str, str] = {}
    for finding in error.errors(include_url=False):
        wanted = expected_at(schema, finding["loc"])
        key = _key(prefix, wanted.key)
        lines.setdefault(key or str(len(lines)), _problem(finding, key, wanted, prefix, schema))
    return list(lines.values())


def booleans_for_numbers(schema: type, values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """A line for each key that takes a number and is true or false, which the validator would read as 1 or 0."""
    for name, field in fields_of(schema).items():
        key, value = _key(prefix, (name,)), values.get(name)
        if isinstance(value, bool) and takes_numbers_only(field.annotation):
            wanted = expected_at(schema, (name,))
            yield f"{key}={shown(value)}: expected {wanted.words}{wanted.example(key)}"
        elif isinstance(value, Mapping) and isinstance(field.annotation, type) and fields_of(field.annotation):
            yield from booleans_for_numbers(field.annotation, value, key)


def _problem(finding: Any, key: str, wanted: Expected, prefix: str, schema: type) -> str:
    """The line about one finding of the validator."""
    kind, location, value = finding["type"], finding["loc"], finding.get("input")
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        known = list(fields_of(schema)) if len(location) == 1 else []
        hint = f"; keys: {', '.join(known)}" if known else ""
        return f"{key}={shown(value)}: unknown key{suggest(str(location[-1]), known)}{hint}"
    if kind in ("value_error", "assertion_error"):
        message = str(finding.get("ctx", {}).get("error") or finding["msg"].partition(", ")[2])
        if not location or message.startswith(f"{prefix}."):  # a check over several keys, which names them itself
            return message
        described = wanted.field.description if wanted.field is not None else None
        return f"{key}={shown(value)}: {message}" + (f" ({described})" if described else "")
    if not location:
        return f"{prefix or 'configuration'}={shown(value)}: expected a group of keys: {', '.join(fields_of(schema))}"
    described = wanted.field.description if wanted.field is not None else None
    needed = f"{wanted.words}{wanted.example(key)}" + (f" ({described})" if described else "")
    if kind.startswith("missing") and isinstance(location[-1], int):
        whole = expected_at(schema, location[:-1])
        list_key = _key(prefix, whole.key)
        return (
            f"{list_key}={shown(value)}: item {location[-1] + 1} is missing; expected {whole.words}"
            f"{whole.example(list_key)}"
        )
    if kind.startswith("missing"):
        return f"{key} is not set: give it a value, {key}=...; expected {needed}"
    near = suggest(str(value)[:100], _words_of(wanted.annotation)) if isinstance(value, str) else ""
    quotes = ""
    if kind == "string_type" and _is_scalar(value):
        whole_word = isinstance(wanted.key[-1], str)
        quotes = f"; write it in quotes, \"{key}='{shown(value)}'\"" if whole_word else "; write it in quotes"
    return f"{key}={shown(value)}: expected {needed}{near}{quotes}"


def _words_of(annotation: Any) -> list[str]:
    """The words that a key takes, where it takes a few."""
    members = [annotation, *get_args(annotation)]
    return [str(word) for member in members if get_origin(member) is Literal for word in get_args(member)]


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def _key(prefix: str, location: tuple[int | str, ...]) -> str:
    key = prefix
    for part in location:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else part
    return key


def shown(value: Any, depth: int = 0) -> str:
    """A value as it is written on the command line, on one line and cut where it is long."""
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    elif depth > _SHOWN_DEPTH:
        text = "..."
    elif isinstance(value, list | tuple):
        text = f"[{','.join(_shown_items(value, depth))}]"
    elif isinstance(value, Mapping):
        pairs = islice(value.items(), _SHOWN_ITEMS)
        text = f"{{{','.join(f'{shown(key)}:{shown(item, depth + 1)}' for key, item in pairs)}}}"
    elif isinstance(value, int) and abs(value) >= 10**100:  # str() refuses more than 4,300 digits
        text = f"{'-' if value < 0 else ''}10^{int(abs(value).bit_length() * 0.30103)}"
    else:
        text = printable(str(value)) or "''"
    return text if len(text) <= 120 else f"{text[:117]}..."


def _shown_items(values: Iterable[Any], depth: int) -> list[str]:
    return [shown(item, depth + 1) for item in islice(values, _SHOWN_ITEMS)]


#: Items and levels of a nested value that are written out before the line is cut.
_SHOWN_ITEMS, _SHOWN_DEPTH = 60, 8


def suggest(word: str, choices: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the nearest choice, or an empty string."""
    near = difflib.get_close_matches(word[:100], list(choices), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


Evaluator = TypeVar("Evaluator")


def placed(evaluator: Evaluator, key: str) -> Evaluator:
    """Tell an evaluator its configuration key, for its messages: two of one class may stand under ``evaluation``."""
    object.__setattr__(evaluator, "key", key)  # it is frozen, and this is no setting of it
    return evaluator
