"""Sides that an evaluator compares, and the parts under which its figures are kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from cfsp.config.contracts import Evaluator
from cfsp.errors import CfspError, ConfigError

__all__ = ["Evaluator", "Side", "parts_of", "under_its_key"]


def parts_of(evaluator: Evaluator) -> Mapping[str, Evaluator]:
    """Return the parts of ``evaluator`` by name; the evaluator itself where it cannot be divided."""
    return evaluator.parts()


@contextmanager
def under_its_key(name: str, evaluator: Evaluator) -> Iterator[None]:
    """Name the key that the evaluator stands under in each error raised inside, since a class may stand under several.

    ``evaluation.generation`` of tables.yaml is a ZeroShot, for instance, whose own messages say
    ``evaluation.zero_shot``.

    Args:
        name: the evaluator's key under ``evaluation``.
        evaluator: the evaluator that runs inside.
    """
    default_name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(evaluator).__name__).lower()
    try:
        yield
    except CfspError as error:
        problems = [re.sub(rf"\bevaluation\.{default_name}\b", f"evaluation.{name}", line) for line in error.problems]
        if default_name == name or problems == list(error.problems):
            raise
        renamed = type(error)(*problems) if isinstance(error, ConfigError) else type(error)("; ".join(problems))
        raise renamed from error


@dataclass(frozen=True)
class Side:
    """One side of a comparison, e.g. the dense or the pruned model.

    Attributes:
        name: name of the side in the record.
        active: returns a context in which the weights of the side are in place.
        storage_dtype: dtype of the side's checkpoint.
    """

    name: str
    active: Callable[[], AbstractContextManager[None]]
    storage_dtype: torch.dtype
