"""What an evaluator is. Checks come first, before any weight is loaded; measuring comes later."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from cfsp.data.calibration import Limits
from cfsp.errors import CfspError, ConfigError
from cfsp.evaluate.measurement import Measurement


class Evaluator(Protocol):
    """One class and one YAML entry under ``evaluation``. ``side_by_side``: measured dense against pruned in turn."""

    side_by_side: ClassVar[bool]

    def check(self, tokenizer: Any, limits: Limits) -> dict[str, Any]:
        """Find and check the inputs; returns what of them decides the figures, by content.

        Raises:
            DataError: an input is missing or does not fit the model.
        """
        ...

    def measure(self, model: nn.Module, tokenizer: Any) -> list[Measurement]:
        """Figures of one model."""
        ...


class DividedEvaluator(Evaluator, Protocol):
    """Measures one thing after another; what is measured is kept, so that a run that is killed does not repeat it."""

    def parts(self) -> dict[str, Evaluator]:
        """Name of a task or text -> the evaluator of it alone; together they measure what this one does."""
        ...


def parts_of(evaluator: Evaluator) -> dict[str, Evaluator]:
    """The parts that ``evaluator`` can be divided into; itself where it cannot."""
    return evaluator.parts() if hasattr(evaluator, "parts") else {"all": evaluator}


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


class SideBySideEvaluator(Evaluator, Protocol):
    """Measures several sides in alternation, so that a drifting machine does not favour one."""

    def measure_sides(self, model: nn.Module, sides: list[Side]) -> dict[str, list[Measurement]]:
        """Figures by side name."""
        ...
