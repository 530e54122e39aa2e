"""The sides that an evaluator compares, and the parts that its figures are kept by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from cfsp.contracts import Evaluator

__all__ = ["Evaluator", "Side", "parts_of"]


def parts_of(evaluator: Evaluator) -> Mapping[str, Evaluator]:
    """Return the parts that ``evaluator`` can be divided into; itself where it cannot."""
    return evaluator.parts()


@dataclass(frozen=True)
class Side:
    """One side of a side-by-side measurement.

    ``active`` puts its weights in place for as long as it is entered; ``storage_dtype`` is that of its checkpoint.
    """

    name: str
    active: Callable[[], AbstractContextManager[None]]
    storage_dtype: torch.dtype
