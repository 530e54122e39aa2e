"""Rows of Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_row(cells: Sequence[str]) -> str:
    """Join cells into a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
