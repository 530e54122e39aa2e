"""Writing a row of a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence


def line(cells: Sequence[str]) -> str:
    """Join cells into a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
