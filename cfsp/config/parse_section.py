"""Validating one section of the configuration, with a line for each wrong value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from cfsp.config.problems import booleans_for_numbers, problems_of, shown
from cfsp.config.sections import Section


def parse_section(name: str, schema: type[Section], values: Any, problems: list[str]) -> Any:
    """Validate the values of a section.

    Args:
        name: key of the section.
        schema: class of the section.
        values: values from the configuration.
        problems: list to which a line is added for each finding.

    Returns:
        The section; None where there are problems.
    """
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
