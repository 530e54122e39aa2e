"""Descriptions of the values that a key accepts, derived from the type annotation of its field.

Validation libraries name their own types ("input should be a valid tuple"). A user needs to know what to write instead:
``expected a whole number from 1, or null, e.g. calibration.n_samples=48``. The description depends only on the
annotation and its constraints, so that every kind of wrong value gets the same answer.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Expected:
    """Values that a key accepts: its annotation with its constraints, and the field that declares it.

    Attributes:
        key: keys and list positions that lead to the value in the configuration.
        annotation: the type, without ``Annotated``.
        constraints: bounds, lengths and patterns of the type.
        field: innermost declared field on the way; None if the location is not a declared key.
    """

    key: tuple[int | str, ...]
    annotation: Any
    constraints: tuple[Any, ...]
    field: FieldInfo | None

    @property
    def description(self) -> str:
        """Description of the accepted values: the title of the field, or e.g. ``a whole number from 1 or null``."""
        if self.field is not None and self.field.title:
            return self.field.title
        return describe_type(self.annotation, self.constraints)

    def example(self, key: str) -> str:
        """Return ``, e.g. KEY=VALUE``, or an empty string if no value is an obvious example."""
        field = self.field
        if field is not None and field.description and "e.g." in field.description:
            return ""
        if field is not None and field.examples:
            value = field.examples[0]
        else:
            default = None if field is None or self.annotation is not _plain(field.annotation)[0] else field.default
            value = _example(self.annotation, self.constraints, default)
        return "" if value is None else f", e.g. {key}={value}"


def fields_of(schema: Any) -> Mapping[str, FieldInfo]:
    """Return the declared keys of a section or a component; empty for any other type."""
    fields = getattr(schema, "__pydantic_fields__", None)
    return fields if isinstance(fields, Mapping) else {}


def expected_at(schema: Any, location: Iterable[int | str]) -> Expected:
    """Return the values expected at the location of a validation error.

    Parts of the location that stand for a member of a union are not keys of the configuration; the path ends there.

    Args:
        schema: section or component class.
        location: ``loc`` of the validation error.
    """
    key: list[int | str] = []
    annotation, constraints, field = schema, (), None
    for part in location:
        annotation, constraints = _plain(annotation, constraints)
        inner = _without_null(annotation)
        declared, origin, arguments = fields_of(inner), get_origin(inner), get_args(inner)
        if declared or hasattr(inner, "__pydantic_fields__"):
            key.append(part)
            field = declared.get(str(part))
            annotation, constraints = (field.annotation, tuple(field.metadata)) if field else (Any, ())
        elif _is_list(inner):
            key.append(part)
            annotation, constraints, field = arguments[0] if arguments else Any, (), None
        elif origin is tuple:
            if not isinstance(part, int) or part >= len(arguments):
                break
            key.append(part)
            annotation, constraints, field = arguments[part], (), None
        elif origin is dict:
            key.append(part)
            annotation, constraints, field = arguments[1] if len(arguments) == 2 else Any, (), None
        else:
            break
    annotation, constraints = _plain(annotation, constraints)
    return Expected(tuple(key), annotation, tuple(constraints), field)


def describe_type(annotation: Any, constraints: Sequence[Any] = ()) -> str:
    """Describe the values that a type accepts: ``a whole number from 1``, ``a list of names``."""
    annotation, constraints = _plain(annotation, constraints)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is bool:
        return "true or false"
    if annotation is int:
        return f"a whole number{_range(constraints)}"
    if annotation is float:
        return f"a finite number{_range(constraints)}"
    if annotation is str:
        if _constraint(constraints, "pattern") is not None:
            return "a name of letters, digits, dots, hyphens and underscores"
        return "text that is not empty" if _constraint(constraints, "min_length") else "text"
    if annotation is None or annotation is type(None):
        return "null"
    if origin is Literal:
        return _joined_by_or([_literal(value) for value in arguments])
    if origin in (Union, types.UnionType):
        members = [_plain(member) for member in arguments]
        words = [
            [_literal(value) for value in get_args(member)]
            if get_origin(member) is Literal
            else [describe_type(member, more)]
            for member, more in members
        ]
        return _joined_by_or([word for several in words for word in several])
    if _is_list(annotation):
        least = _constraint(constraints, "min_length")
        return f"a list{_items_of(arguments)}" + (f", {least} or more" if least else "")
    if origin is tuple:
        return f"a list of {len(arguments)}: [{', '.join(describe_type(member) for member in arguments)}]"
    if origin is dict or annotation is dict:
        return "keys with values, {key: value}"
    if fields_of(annotation):
        return f"a group of keys: {', '.join(fields_of(annotation))}"
    return "another value"


def takes_numbers_only(annotation: Any) -> bool:
    """Return whether a type is int or float, or null; to a user true and false are not numbers."""
    return _without_null(_plain(annotation)[0]) in (int, float)


def _plain(annotation: Any, constraints: Sequence[Any] = ()) -> tuple[Any, tuple[Any, ...]]:
    """Return an annotation without ``Annotated``, and the constraints that it carried."""
    gathered = list(constraints)
    while get_origin(annotation) is Annotated:
        annotation, *extra = get_args(annotation)
        for item in extra:
            gathered.extend(item.metadata if isinstance(item, FieldInfo) else [item])
    return annotation, tuple(gathered)


def _without_null(annotation: Any) -> Any:
    """Return the type that an optional type wraps; any other annotation unchanged."""
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [member for member in get_args(annotation) if member is not type(None)]
        if len(rest) == 1:
            return _plain(rest[0])[0]
    return annotation


def _is_list(annotation: Any) -> bool:
    origin, arguments = get_origin(annotation), get_args(annotation)
    return annotation is list or origin is list or (origin is tuple and arguments[1:] == (Ellipsis,))


def _constraint(constraints: Iterable[Any], name: str) -> Any:
    """Return the value of a bound, a length or a pattern among the constraints; None if there is none."""
    for item in constraints:
        value = getattr(item, name, None)
        if value is None and isinstance(getattr(item, "__dict__", None), dict):
            value = vars(item).get(name)
        if value is not None:
            return value
    return None


def _range(constraints: Sequence[Any]) -> str:
    least, above = _constraint(constraints, "ge"), _constraint(constraints, "gt")
    most, below = _constraint(constraints, "le"), _constraint(constraints, "lt")
    parts = [
        f" from {least}" if least is not None else "",
        f" above {above}" if above is not None else "",
        f" to {most}" if most is not None and least is not None else f" up to {most}" if most is not None else "",
        f" and below {below}" if below is not None and (least, above) != (None, None) else "",
        f" below {below}" if below is not None and (least, above) == (None, None) else "",
    ]
    return "".join(parts)


def _items_of(arguments: Sequence[Any]) -> str:
    member = _plain(arguments[0])[0] if arguments else Any
    if get_origin(member) is Literal:
        return f" of {', '.join(_literal(value) for value in get_args(member))}"
    names = {str: "names", int: "whole numbers", float: "numbers"}
    return f" of {names[member]}" if member in names else ""


def _literal(value: Any) -> str:
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )


def _joined_by_or(words: Sequence[str]) -> str:
    *first_words, last = dict.fromkeys(words)
    if not first_words:
        return last
    return f"{', '.join(first_words)} or {last}"


def _example(annotation: Any, constraints: Sequence[Any], default: Any) -> str | None:
    """Return an example value in the notation of the command line."""
    annotation, constraints = _without_null(annotation), _plain(annotation, constraints)[1]
    if get_origin(annotation) in (Union, types.UnionType):
        return None
    if annotation is bool or get_origin(annotation) is Literal:
        return None  # the description names every value
    if annotation in (int, float) and isinstance(default, int | float) and not isinstance(default, bool):
        return f"{default:g}" if isinstance(default, float) else str(default)
    if annotation is int:
        return str(max(1, _constraint(constraints, "ge") or 1))
    if annotation is float:
        high = _constraint(constraints, "le") or _constraint(constraints, "lt") or math.inf
        return "0.5" if high <= 1 else "1.0"
    if _is_list(annotation):
        member = _plain(get_args(annotation)[0])[0] if get_args(annotation) else str
        return f"[{get_args(member)[0]}]" if get_origin(member) is Literal else "[a,b]" if member is str else "[1,2]"
    if get_origin(annotation) is tuple:
        return f"[{','.join(_examples(get_args(annotation)))}]"
    return None


def _examples(members: Iterable[Any]) -> Iterator[str]:
    for member in members:
        yield _example(*_plain(member), None) or "a"
