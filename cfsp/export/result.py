"""Result of an export."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes:
        place: folder or file that was written.
        format: name of the format.
        bytes: size of the weights in bytes.
        notes: sentences for the user, e.g. how many zero neurons were added and where.
    """

    place: Path
    format: str
    bytes: int
    notes: tuple[str, ...] = field(default=())
