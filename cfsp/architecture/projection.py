"""A weight matrix of a layer as [out, in], also where the model stores it transposed or fused with others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Projection:
    """A linear map [out, in]: a whole matrix, or some rows of a fused one (gate and up; q, k and v).

    Attributes:
        owner: the module that has the matrix as a child.
        name: attribute name of the child, an nn.Linear or transformers' Conv1D, which stores [in, out] (GPT-2).
        rows: output rows of a fused matrix that are this projection, in the order of its units; None: all.
    """

    owner: nn.Module
    name: str
    rows: tuple[range, ...] | None = None

    @property
    def module(self) -> nn.Module:
        """Module that holds the matrix."""
        return getattr(self.owner, self.name)

    @property
    def parameter(self) -> nn.Parameter:
        """Parameter as it is stored; a fused matrix is whole."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """Matrix [out, in]; a view of the parameter unless its rows lie apart."""
        return self.part(self.parameter)

    @property
    def bias(self) -> Tensor | None:
        """Bias [out]; None where there is none."""
        bias: Any = self.module.bias
        return None if bias is None else self._own_rows(bias)

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return self._stored_shape[0] if self.rows is None else sum(len(rows) for rows in self.rows)

    @property
    def in_features(self) -> int:
        """Number of inputs."""
        return self._stored_shape[1]

    def part(self, stored: Tensor) -> Tensor:
        """Return this projection's part [out, in] of a tensor that is laid out like the parameter, e.g. a gradient."""
        return self._own_rows(stored.T if is_transposed(self.module) else stored)

    def rows_of(self, units: Tensor) -> Tensor:
        """Return the rows in the whole matrix of the rows ``units`` (int64) of this projection."""
        return units if self.rows is None else self._index.to(units.device)[units]

    def register_forward_pre_hook(self, hook: Callable[..., Any]) -> Any:
        """Register a hook on the module; its first argument holds the input channels [..., in]."""
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
    """Return whether a module stores its matrix as [in, out], as transformers' Conv1D does."""
    return hasattr(module, "nf") and hasattr(module, "nx") and not isinstance(module, nn.Linear)


def is_matrix(module: Any) -> bool:
    """Return whether a module can be (part of) a projection."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Module) and is_transposed(module))


def projections_named(owner: nn.Module, names: Sequence[str]) -> tuple[Projection, ...] | None:
    """Return the projections with these attribute names, as whole matrices; None where one of them is missing."""
    if not all(is_matrix(getattr(owner, name, None)) for name in names):
        return None
    return tuple(Projection(owner, name) for name in names)


def distinct(projections: Sequence[Projection]) -> list[Projection]:
    """Return one projection for each matrix."""
    return list({(id(part.owner), part.name): part for part in projections}.values())


def stored_parameters(projections: Sequence[Projection]) -> int:
    """Count the parameters of the matrices and their biases; a fused matrix counts once."""
    return sum(p.numel() for part in distinct(projections) for p in part.module.parameters())
