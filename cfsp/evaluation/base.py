"""Sides of a comparison, parts of an evaluator, and the evaluator's key in error messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from cfsp.config.contracts import Evaluator
from cfsp.errors import CfspError, ConfigError

__all__ = ["Evaluator", "Side", "name_key_in_errors", "parts_of"]


def parts_of(evaluator: Evaluator) -> Mapping[str, Evaluator]:
    """Return the parts of ``evaluator`` by name; if it cannot be divided, the evaluator itself is the only part."""
    return evaluator.parts()


@contextmanager
def name_key_in_errors(name: str, evaluator: Evaluator) -> Iterator[None]:
    """Replace the class's default key by the evaluator's actual key in the messages of errors raised inside.

    A class may be configured under several keys. For instance, ``evaluation.generation`` of tables.yaml is a ZeroShot,
    and messages of that class name ``evaluation.zero_shot``.

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
