"""Names from the configuration that become names of files and folders."""

from __future__ import annotations

import re
from typing import Any

_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")
RULE = "it becomes the name of a folder: use 1 to 100 of the characters A-Z a-z 0-9 . _ -"


def is_name(value: Any) -> bool:
    """Return whether a value can be the name of a file or folder, or a part of such a name."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None and value.strip(".") != ""


def name_like(text: str) -> str:
    """Return a valid name that is as close to ``text``, the name of a place, as can be.

    Example:
        >>> name_like("My model (1)")
        'My-model-1-'
        >>> name_like("")
        'model'
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:100]
    return name if is_name(name) else "model"


def checked_name(value: str) -> str:
    """Return ``value`` if it can be the name of a folder.

    Raises:
        ValueError: it cannot.
    """
    if not is_name(value):
        raise ValueError(RULE)
    return value
