"""Build components from a ``_target_`` and its settings, which are checked against the signature of the class.

A new metric, allocator, recovery, evaluator or logger is one class, decorated with :func:`component`, and one YAML
file; no central list is edited. Of cfsp's own classes only those that :func:`component` marks are built. Classes of
other packages run foreign code, so each of these packages must stand in ``plugins.allow=[package]``.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Generic, TypeVar, dataclass_transform

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from cfsp.config.contracts import optional_members, required_members
from cfsp.config.deciding import separate
from cfsp.config.problems import booleans_for_numbers, problems_of, shown, suggest
from cfsp.errors import ConfigError, printable
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
    """Decorate a class so that a ``_target_`` may name it.

    The class becomes a frozen pydantic dataclass: its fields are the keys of its YAML file, values are checked against
    their types, and unknown keys are errors.

    Example:
        >>> @component
        ... class WeightNorm(NeuronImportance):
        ...     p: Literal[1, 2] = 1
        ...
        ...     def score(self, channels, activation): ...
    """
    decorated: Any = pydantic_dataclass(cls, frozen=True, config=ConfigDict(extra="forbid"))
    setattr(decorated, _MARK, True)
    return decorated


@dataclass(frozen=True)
class Component(Generic[Contract]):
    """Instance of a component together with the configuration from which it was built.

    Attributes:
        instance: the component itself.
        target: ``_target_``, the path of its class.
        settings: value of every key, defaults included.
    """

    instance: Contract
    target: str
    settings: dict[str, Any]

    def identity(self) -> dict[str, Any]:
        """Return the parts of this component that decide a result: its name, deciding settings and foreign code.

        A component of cfsp is named without its module, so that code can move; the version of the methods
        (:data:`cfsp.config.identity.METHOD_VERSION`) covers its code. A class outside cfsp is named by its path and
        the digest of its source. Inputs are left out (:mod:`cfsp.config.deciding`).
        """
        name, deciding = component_name(self.target), separate(type(self.instance), self.settings).values
        if name is not None:
            return {"component": name, **deciding}
        return {"class": self.target, "source": _source_digest(self.instance), **deciding}


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
    """Return the sha256 of the module that defines the class; None if it has no source file."""
    try:
        source = inspect.getsource(inspect.getmodule(type(instance)))  # type: ignore[arg-type]
    except (OSError, TypeError):
        return None
    return hashlib.sha256(source.encode()).hexdigest()


def build(name: str, values: Any, allowed: Iterable[str] = (), contract: type[Any] | None = None) -> Component[Any]:
    """Instantiate the component of configuration group ``name``.

    Args:
        name: key of the group, e.g. ``importance`` or ``evaluation.cost``.
        values: ``_target_`` and settings of the group.
        allowed: packages outside cfsp that a ``_target_`` may name.
        contract: protocol of :mod:`cfsp.config.contracts` that the instance has to fulfil. The class must have the
            members that the contract requires; optional members that it lacks get the defaults of the contract.

    Raises:
        ConfigError: there is no ``_target_``, the target is not allowed, does not exist or is of another kind, or its
            settings are wrong.
    """
    if not isinstance(values, Mapping) or not values.get("_target_"):
        way_out = f"null leaves it out, {name}.KEY=VALUE sets a key" if "." in name else f"e.g. {name}=OPTION"
        raise ConfigError(f"{name}={shown(values)}: a group with a _target_ class is expected; {way_out}")
    settings = {str(key): value for key, value in values.items() if key != "_target_"}
    if not isinstance(values["_target_"], str) or not re.fullmatch(r"[^\W\d][\w.]{0,300}", values["_target_"]):
        raise ConfigError(f"{name}._target_={shown(values['_target_'])}: expected the name of a class, module.Class")
    target = values["_target_"]
    cls = _resolve(name, target, allowed)
    required = () if contract is None else required_members(contract)
    _check_attributes(name, target, cls, required)
    wrong = [*booleans_for_numbers(cls, settings, name)]
    if wrong:
        raise ConfigError(*wrong)
    if contract is not None:
        cls = _with_defaults(cls, contract)
    try:
        instance = cls(**settings)
    except ValidationError as error:
        raise ConfigError(*(_with_own_key(line, cls, name) for line in problems_of(error, name, cls))) from error
    except TypeError as error:
        raise ConfigError(f"{name}: {target} does not accept these keys: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
    _check_attributes(name, target, instance, required)
    known = asdict(instance) if hasattr(instance, "__dataclass_fields__") else settings
    return Component(instance, target, known)


def _with_own_key(line: str, cls: type, name: str) -> str:
    """Replace the usual key of a class in a message by the key ``name``, under which this instance is configured.

    ``evaluation`` may hold two evaluators of one class, and :func:`with_key` sets their keys only after they are built.
    """
    usual = getattr(cls, "key", None)
    return re.sub(rf"{re.escape(usual)}(?!\w)", name, line) if isinstance(usual, str) else line


def _with_defaults(cls: type, contract: type[Any]) -> type:
    """Return a subclass with the optional members of ``contract`` that ``cls`` lacks; ``cls`` if it lacks none."""
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


def _check_attributes(name: str, target: str, candidate: Any, required: Iterable[str]) -> None:
    """Refuse a class or an instance without the members that its group requires.

    Classes of cfsp are checked before they are called. A foreign class may add members to its instances, so only the
    instance is checked.
    """
    abstract = getattr(candidate, "__abstractmethods__", ()) if isinstance(candidate, type) else ()
    lacking = [attribute for attribute in required if attribute in abstract]
    if not isinstance(candidate, type) or _is_component(candidate):
        declared = getattr(candidate, "__dataclass_fields__", {})
        lacking += [
            attribute for attribute in required if not hasattr(candidate, attribute) and attribute not in declared
        ]
    if lacking:
        group = name.split(".", 1)[0]
        raise ConfigError(f"{name}._target_={target}: no class for {group}, it has no {', '.join(lacking)}")


def _is_component(cls: type) -> bool:
    """Return whether cfsp defines the class and marks this very class, not only a base of it, as a component."""
    return _package(cls.__module__) == "cfsp" and _MARK in vars(cls)


def _package(dotted: str) -> str:
    return dotted.partition(".")[0]


def _resolve(name: str, target: str, allowed: Iterable[str]) -> type:
    """Return the class of a ``_target_``; nothing is called, and no module outside cfsp and ``allowed`` is imported.

    Raises:
        ConfigError: there is no such class, cfsp defines it and it is no component, or a package is not allowed. Both
            the package that the target names and the package that defines the class must be allowed.
    """
    module_name, _, class_name = target.rpartition(".")
    packages = {"cfsp", *allowed}
    if _package(target) not in packages:
        raise ConfigError(
            f"{name}._target_={target}: classes outside cfsp run foreign code; allow it with "
            f"plugins.allow=[{_package(target)}]"
        )
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # a module of the user's may fail in any way while it is imported
        raise ConfigError(
            f"{name}._target_={target}: there is no such class{_import_failure(module_name, error)}"
            f"{suggest(target, _known_targets())}"
        ) from error
    if not isinstance(cls, type):
        raise ConfigError(f"{name}._target_={target}: a class is needed, this is a {type(cls).__name__}")
    defined_in = _package(cls.__module__)
    if _is_component(cls) or (defined_in != "cfsp" and _package(target) != "cfsp" and defined_in in packages):
        return cls
    if defined_in == "cfsp" or _package(target) == "cfsp":
        group = name.split(".", 1)[0]
        raise ConfigError(
            f"{name}._target_={target}: this is no class to plug in{suggest(target, _known_targets())}; choose one "
            f"with {group}=OPTION"
        )
    raise ConfigError(
        f"{name}._target_={target}: this class is defined in {cls.__module__}; to run the code of both packages give "
        f"plugins.allow=[{','.join(sorted({_package(target), defined_in}))}]"
    )


def _import_failure(module_name: str, error: Exception) -> str:
    """Return a clause on why importing a module failed; empty if it was imported or does not exist."""
    if not module_name or module_name in sys.modules:
        return ""
    if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
        return f" (no module {error.name})"
    return f" (importing {module_name} raises {type(error).__name__}: {printable(str(error))})"


def known_class(target: str) -> type | None:
    """Return the class of a ``_target_`` if cfsp defines it or its module is imported already; otherwise None.

    It serves the settings of earlier runs, because reading a record must not import foreign code.
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
    """Return the override that chooses the class of ``instance``: ``group=OPTION``, or ``group._target_=CLASS``."""
    target = f"{type(instance).__module__}.{type(instance).__qualname__}"
    for path in sorted((config_folder() / group).glob("*.yaml")):
        if re.search(rf"^_target_:\s*{re.escape(target)}\s*$", path.read_text(encoding="utf-8"), re.MULTILINE):
            return f"{group}={path.stem}"
    return f"{group}._target_={target}"


def _known_targets() -> set[str]:
    """Return the classes that the configuration files name."""
    texts = (path.read_text(encoding="utf-8") for path in config_folder().rglob("*.yaml"))
    return {target for text in texts for target in re.findall(r"^\s*_target_:\s*(\S+)", text, re.MULTILINE)}


Evaluator = TypeVar("Evaluator")


def with_key(evaluator: Evaluator, key: str) -> Evaluator:
    """Set the key that an evaluator names in its messages, because ``evaluation`` may hold two of one class."""
    object.__setattr__(evaluator, "key", key)  # the instance is frozen, and the key is not a setting
    return evaluator
