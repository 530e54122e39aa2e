"""Matrices of parameters of which a part that covers them is fast, and the rest is marked slow."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest


def pairwise(*axes: Sequence[Any]) -> list[Any]:
    """Return the full product; all but a subset in which every pair of values of two axes occurs is marked slow.

    Args:
        *axes: values of each parameter, in the order of the test's parameters.
    """
    product = list(itertools.product(*axes))
    places = list(itertools.combinations(range(len(axes)), 2))

    def pairs(point: tuple) -> set[tuple]:
        return {(a, b, point[a], point[b]) for a, b in places}

    missing = set().union(*map(pairs, product))
    fast = set()
    while missing:
        best = max(product, key=lambda point: len(pairs(point) & missing))
        fast.add(best)
        missing -= pairs(best)
    return _marked(product, lambda *point: point in fast)


def in_turn(first: Iterable[Any], second: Sequence[Any], always: Callable[[Any, Any], bool] | None = None) -> list[Any]:
    """Return the full product; each value of ``first`` meets those of ``second`` in turn, the rest is marked slow.

    Args:
        first: values of the long axis.
        second: values of the short axis.
        always: pairs that stay fast; values of ``second`` that it takes for every value of ``first`` wait for no turn.
    """
    rows = list(first)
    turns = [b for b in second if always is None or not all(always(a, b) for a in rows)]
    fast = {(a, turns[at % len(turns)]) for at, a in enumerate(rows)}
    return _marked(
        itertools.product(rows, second), lambda a, b: (a, b) in fast or (always is not None and always(a, b))
    )


def _marked(product: Iterable[tuple], is_fast: Callable[..., bool]) -> list[Any]:
    return [pytest.param(*point, marks=() if is_fast(*point) else pytest.mark.slow) for point in product]
