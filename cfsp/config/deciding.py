"""Marks on configuration fields, which state what a setting decides: figures, a name, or nothing.

A field without a mark decides the figures by its value. Any other meaning is a :class:`Decides` among the metadata of
its annotation, in the sections of cfsp and in every component::

    log_every: Annotated[int, Decides("nothing")] = 10
    table: Annotated[str, Decides("content")]
    gram_share: Annotated[float, Decides(before=1.0)] = 1.0

:func:`separate` reads the marks. The identity of a run and the key by which tables match its record use its result.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from cfsp.system.expected import fields_of

#: Default of :attr:`Decides.before`: every version has had the setting.
_ALWAYS: Any = object()


@dataclass(frozen=True)
class Decides:
    """Mark of a field, which states what its setting decides.

    Attributes:
        what: "figures": the value decides figures. "nothing": no figure depends on it. "content": it names where an
            input lies, and the content decides. "name": it names a run or an input; tables tell runs apart by it, and
            no figure depends on it.
        before: value that reproduces versions without this setting. With this value the setting is left out of the
            identity, so that runs of those versions keep theirs.
        alike: (value, other): two values that stand for the same. The identity has ``value`` for both, tables have
            ``other`` for both.
        chosen_by: name of the field that names the used entries of a dictionary, as a list or as keys; other entries
            decide nothing.
    """

    what: Literal["figures", "nothing", "content", "name"] = "figures"
    before: Any = _ALWAYS
    alike: tuple[Any, Any] | None = None
    chosen_by: str | None = None


@dataclass
class Parts:
    """Settings of a group, separated by what they decide.

    Attributes:
        values: settings that decide by their value, nested as they were.
        places: dotted key -> where an input lies, whose content decides.
    """

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, Any] = field(default_factory=dict)

    def add(self, key: str, value: Any) -> None:
        """Add a value that decides, or the parts of a nested group."""
        if not isinstance(value, Parts):
            self.values[key] = value
            return
        self.values[key] = value.values
        self.places |= {f"{key}.{name}": place for name, place in value.places.items()}


#: Function: ``_target_`` -> the class (None if unknown), and the name of the component.
Lookup = Callable[[str], tuple[type | None, str]]


def separate(schema: type | None, settings: Mapping[str, Any], lookup: Lookup | None = None) -> Parts:
    """Separate the settings of a group by the marks on the fields of its class.

    Args:
        schema: section, component or dataclass that declares the settings. Settings that it does not declare decide
            by their value; with None all settings do.
        settings: settings from a configuration or an earlier record; some may be missing.
        lookup: opens components by ``_target_``. With it the settings are those that tables match runs by: names
            count, and one of two alike values stands for both. Without it they are those of the identity.
    """
    fields = declared(schema)
    unused = getattr(schema, "unused_settings", None)
    left_out = set(unused(settings)) if callable(unused) else set()
    for key, (_, mark) in fields.items():
        if mark.chosen_by is not None and key in settings and settings.get(mark.chosen_by) is not None:
            settings = {**settings, key: {name: settings[key].get(name) for name in settings[mark.chosen_by]}}
            if not isinstance(settings[mark.chosen_by], Mapping):  # a list: the names of the entries replace it
                left_out.add(mark.chosen_by)
    parts = Parts()
    for key, value in settings.items():
        annotation, mark = fields.get(key, (Any, Decides()))
        if key in left_out or mark.what == "nothing" or (mark.before is not _ALWAYS and value == mark.before):
            continue
        if mark.what == "content":
            parts.places[key] = value
        elif mark.alike is not None and value in mark.alike:
            parts.values[key] = mark.alike[0 if lookup is None else 1]
        elif lookup is not None or mark.what != "name":
            parts.add(key, _part_of(annotation, value, lookup))
    return parts


def deciding_settings(instance: Any) -> dict[str, Any]:
    """Return what an instance of a section or of a component adds to the identity of a run, by its marks.

    Inputs are left out; the code that reads an input adds its content to the identity.
    """
    return separate(type(instance), {key: getattr(instance, key) for key in fields_of(type(instance))}).values


@cache
def declared(schema: type | None) -> dict[str, tuple[Any, Decides]]:
    """Return the type and the mark of each field of a section, a component or a dataclass; empty for other types."""
    if schema is None:
        return {}
    if described := fields_of(schema):
        return {key: (field.annotation, _mark(field.metadata)) for key, field in described.items()}
    if not dataclasses.is_dataclass(schema):
        return {}
    try:
        hints = get_type_hints(schema, include_extras=True)
    except NameError:  # names that only a type checker imports: no component of cfsp, and all its settings count
        return {}
    return {field.name: _without_mark(hints[field.name]) for field in dataclasses.fields(schema)}


def _mark(metadata: Any) -> Decides:
    return next((item for item in metadata if isinstance(item, Decides)), Decides())


def _without_mark(annotation: Any) -> tuple[Any, Decides]:
    if get_origin(annotation) is not Annotated:
        return annotation, Decides()
    inner, *metadata = get_args(annotation)
    return inner, _mark(metadata)


def _part_of(annotation: Any, value: Any, lookup: Lookup | None) -> Any:
    """Separate the value if it is a group of keys (:class:`Parts`); return other values unchanged.

    Raises:
        TypeError: a value stands where the keys of a section are expected, as in a damaged record.
    """
    schemas = _schemas(annotation)
    if not isinstance(value, Mapping):
        if schemas and value is not None and not isinstance(value, schemas):
            raise TypeError(f"a group of keys is expected, found a {type(value).__name__}")
        return value
    if lookup is not None and "_target_" in value:
        schema, name = lookup(str(value["_target_"]))
        return separate(schema, {**value, "_target_": name}, lookup)
    if get_origin(annotation) in (dict, Mapping):  # a group of entries of one type
        parts = Parts()
        for key, entry in value.items():
            parts.add(key, _part_of(get_args(annotation)[1], entry, lookup))
        return parts
    if len(schemas) > 1:
        schemas = tuple(
            candidate
            for candidate in schemas
            if value.get("kind") in get_args(declared(candidate).get("kind", (None,))[0])
        )
    return separate(schemas[0] if len(schemas) == 1 else None, value, lookup)


def _schemas(annotation: Any) -> tuple[type, ...]:
    """Return the classes of an annotation that declare settings."""
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return tuple(member for member in members if isinstance(member, type) and declared(member))
