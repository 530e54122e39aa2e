"""The sides that an evaluator compares, and the parts that its figures are kept by."""

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
    """Return the parts that ``evaluator`` can be divided into; itself where it cannot."""
    return evaluator.parts()


@contextmanager
def under_its_key(name: str, evaluator: Evaluator) -> Iterator[None]:
    """Have errors of an evaluator name the key that it stands under: a class may stand under several.

    ``evaluation.generation`` of tables.yaml is a ZeroShot, whose own messages say ``evaluation.zero_shot``.
    """
    usual = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(evaluator).__name__).lower()
    try:
        yield
    except CfspError as error:
        problems = [re.sub(rf"\bevaluation\.{usual}\b", f"evaluation.{name}", line) for line in error.problems]
        if usual == name or problems == list(error.problems):
            raise
        renamed = type(error)(*problems) if isinstance(error, ConfigError) else type(error)("; ".join(problems))
        raise renamed from error


@dataclass(frozen=True)
class Side:
    """One side of a side-by-side measurement.

    ``active`` puts its weights in place for as long as it is entered; ``storage_dtype`` is that of its checkpoint.
    """

    name: str
    active: Callable[[], AbstractContextManager[None]]
    storage_dtype: torch.dtype
