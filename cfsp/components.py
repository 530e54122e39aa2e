"""The registry: a ``_target_`` and its keys become an instance of that class, typed by the class signature.

A new metric, allocator, recovery, evaluator or logger is one class (a pydantic dataclass: :func:`component`) and
one YAML file; nothing central is edited. Targets outside ``cfsp.`` run foreign code, so they need
``plugins.allow=[package]``.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from cfsp.errors import ConfigError

#: Decorator of every pluggable class: frozen, typed, unknown keys are errors.
component = pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid"))


@dataclass(frozen=True)
class Component:
    """An instance together with the configuration it was built from (which goes to the record)."""

    instance: Any
    target: str
    settings: dict[str, Any]

    def identity(self) -> dict[str, Any]:
        """What of this component decides a result: its class and every setting."""
        return {"class": self.target, **self.settings}


def build(name: str, values: Any, allowed: Iterable[str] = ()) -> Component:
    """Instantiate the component of configuration group ``name``.

    Raises:
        ConfigError: no ``_target_``, a target that is not allowed or does not exist, or wrong settings.
    """
    if not isinstance(values, Mapping) or not values.get("_target_"):
        raise ConfigError(f"{name}={values!r}: a group with a _target_ class is expected")
    settings = {str(key): value for key, value in values.items() if key != "_target_"}
    target = str(values["_target_"])
    cls = _resolve(name, target, allowed)
    try:
        instance = cls(**settings)
    except ValidationError as error:
        raise ConfigError(*problems_of(error, name, cls)) from error
    except TypeError as error:
        raise ConfigError(f"{name}: {target} does not accept these keys: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
    known = asdict(instance) if hasattr(instance, "__dataclass_fields__") else settings
    return Component(instance, target, known)


def _resolve(name: str, target: str, allowed: Iterable[str]) -> type:
    module_name, _, class_name = target.rpartition(".")
    package = target.split(".", 1)[0]
    if package != "cfsp" and package not in set(allowed):
        raise ConfigError(
            f"{name}._target_={target}: classes outside cfsp run foreign code; allow it with plugins.allow=[{package}]"
        )
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{name}._target_={target}: there is no such class ({error})") from error


def problems_of(error: ValidationError, prefix: str, schema: type) -> list[str]:
    """One line per finding: the key, the value, what is allowed and the way out."""
    lines = []
    described = getattr(schema, "model_fields", None) or {}
    names = list(described) or [field.name for field in fields(schema)]
    for finding in error.errors():
        location = [str(part) for part in finding["loc"]]
        key = ".".join([prefix, *location] if prefix else location)
        if finding["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            lines.append(f"{key}: unknown key{suggest(location[-1], names)}; keys: {', '.join(names)}")
            continue
        if finding["type"].startswith("missing"):
            lines.append(f"{key} is not set: give it a value, {key}=...")
            continue
        message = finding["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        field = described.get(location[0]) if location else None
        hint = f" ({field.description})" if field is not None and field.description else ""
        lines.append(f"{key}={finding['input']}: {message}{hint}")
    return lines


def suggest(word: str, choices: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the nearest choice, or an empty string."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
