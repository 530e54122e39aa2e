"""What an export gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Exported:
    """What was written: ``place`` is a folder or a file, ``form`` the format's name, ``bytes`` its weights.

    notes: sentences for the user, e.g. how many zero neurons were added and where.
    """

    place: Path
    form: str
    bytes: int
    notes: tuple[str, ...] = field(default=())
