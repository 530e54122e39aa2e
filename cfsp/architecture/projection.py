"""One matrix of a layer as [out, in], wherever the architecture keeps it: alone, transposed, or fused with others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Projection:
    """``owner.name`` is an nn.Linear, or transformers' Conv1D, which stores [in, out] (GPT-2).

    rows: of a fused matrix (gate and up in one; q, k and v in one) the output rows that are this projection's, in the
    order of its units; None: all.
    """

    owner: nn.Module
    name: str
    rows: tuple[range, ...] | None = None

    @property
    def module(self) -> nn.Module:
        return getattr(self.owner, self.name)

    @property
    def parameter(self) -> nn.Parameter:
        """As it is stored, fused matrices whole."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """[out, in]; a view of the parameter unless its rows lie apart."""
        return self.part(self.parameter)

    @property
    def bias(self) -> Tensor | None:
        """[out]."""
        bias: Any = self.module.bias
        return None if bias is None else self._own_rows(bias)

    @property
    def out_features(self) -> int:
        return self._stored_shape[0] if self.rows is None else sum(len(rows) for rows in self.rows)

    @property
    def in_features(self) -> int:
        return self._stored_shape[1]

    def part(self, stored: Tensor) -> Tensor:
        """What is this projection's of a tensor laid out as its parameter is, such as a gradient; [out, in]."""
        return self._own_rows(stored.T if is_transposed(self.module) else stored)

    def rows_of(self, units: Tensor) -> Tensor:
        """Rows of the whole matrix that the rows ``units`` (int64) of this projection are."""
        return units if self.rows is None else self._index.to(units.device)[units]

    def register_forward_pre_hook(self, hook: Callable[..., Any]) -> Any:
        """On the module: its first argument holds the input channels [..., in]."""
        return self.module.register_forward_pre_hook(hook)

    @property
    def _stored_shape(self) -> tuple[int, int]:
        first, second = self.parameter.shape
        return (second, first) if is_transposed(self.module) else (first, second)

    def _own_rows(self, values: Tensor) -> Tensor:
        if self.rows is None:
            return values
        if len(self.rows) == 1:
            return values[self.rows[0].start : self.rows[0].stop]
        return values.index_select(0, self._index.to(values.device))

    @cached_property
    def _index(self) -> Tensor:
        assert self.rows is not None
        return torch.cat([torch.arange(rows.start, rows.stop) for rows in self.rows])


def is_transposed(module: nn.Module) -> bool:
    """Whether a module stores its matrix as [in, out]: transformers' Conv1D."""
    return hasattr(module, "nf") and hasattr(module, "nx") and not isinstance(module, nn.Linear)


def is_matrix(module: Any) -> bool:
    """Whether a module can be (part of) a projection."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Module) and is_transposed(module))


def of_names(owner: nn.Module, names: Sequence[str]) -> tuple[Projection, ...] | None:
    """The whole projections of these attribute names; None where one is not there."""
    if not all(is_matrix(getattr(owner, name, None)) for name in names):
        return None
    return tuple(Projection(owner, name) for name in names)


def distinct(projections: Sequence[Projection]) -> list[Projection]:
    """One projection of each matrix."""
    return list({(id(one.owner), one.name): one for one in projections}.values())


def stored_parameters(projections: Sequence[Projection]) -> int:
    """Parameters of the matrices and biases, of fused ones once."""
    return sum(p.numel() for one in distinct(projections) for p in one.module.parameters())
