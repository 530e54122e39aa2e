"""The budget: what a ratio of a scope asks of the FFN neurons, and whole widths that meet it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from cfsp.errors import BudgetError

if TYPE_CHECKING:
    from cfsp.models.views import DecoderView

Scope = Literal["ffn", "decoder", "model"]
Rounding = Literal["exact", "nearest"]


@dataclass(frozen=True)
class Budget:
    """Remove ``ratio`` of the parameters of ``scope`` by removing FFN neurons.

    scope ffn: the parameters that go with the neurons; decoder: everything in the blocks; model: everything.
    Legal widths of a block: the multiples of ``round_to`` from ``min_width`` (None: ``round_to``) up, and its own N.
    """

    ratio: float
    scope: Scope = "ffn"
    round_to: int = 32
    rounding: Rounding = "exact"
    min_width: int | None = None


@dataclass(frozen=True)
class Sizes:
    """The countable side of a model: per block N and parameters per neuron; totals of the wider scopes."""

    widths: tuple[int, ...]
    neuron_parameters: tuple[int, ...]
    decoder_parameters: int
    model_parameters: int

    @staticmethod
    def of(view: DecoderView) -> Sizes:
        return Sizes(tuple(view.widths), tuple(view.neuron_parameters), view.decoder_parameters, view.model_parameters)

    def of_scope(self, scope: Scope) -> int:
        """Parameters of a scope."""
        totals = {
            "ffn": self.ffn_parameters,
            "decoder": self.decoder_parameters,
            "model": self.model_parameters,
        }
        return totals[scope]

    @property
    def parameters(self) -> list[int]:
        """FFN parameters of each block."""
        return [n * cost for n, cost in zip(self.widths, self.neuron_parameters, strict=True)]

    @property
    def ffn_parameters(self) -> int:
        return sum(self.parameters)


@dataclass(frozen=True)
class Widths:
    """Kept neurons per block, and what was asked for beside what it amounts to."""

    per_block: tuple[int, ...]
    requested: dict[str, Any]
    achieved: dict[str, Any]


def keep_fraction(budget: Budget, sizes: Sizes) -> float:
    """The fraction of FFN parameters to keep so that ``ratio`` of the scope goes.

    Raises:
        BudgetError: not even the smallest legal widths remove that much; names the largest ratio that can be met.
    """
    removed = budget.ratio * sizes.of_scope(budget.scope)
    most = sum((n - _legal(n, budget)[0]) * cost for n, cost in zip(sizes.widths, sizes.neuron_parameters, strict=True))
    step = max(_widest_step(n, budget) * cost for n, cost in zip(sizes.widths, sizes.neuron_parameters, strict=True))
    if removed > most + step / 2 or removed >= sizes.ffn_parameters:
        smallest = f"sparsity.min_width={budget.min_width or budget.round_to} sparsity.round_to={budget.round_to}"
        wish = f"sparsity.ratio={budget.ratio} of sparsity.scope={budget.scope} cannot be met"
        largest = _rounded_down(most / sizes.of_scope(budget.scope))
        if not largest:
            raise BudgetError(
                f"{wish}: with {smallest} no neuron of blocks of width {max(sizes.widths)} can go; use smaller ones"
            )
        scope = "" if budget.scope == "ffn" else ", or sparsity.scope=ffn"
        raise BudgetError(
            f"{wish}: going down to {smallest} removes {largest:.4f} at most; use sparsity.ratio={largest:g} or "
            f"less, a smaller min_width or round_to{scope}"
        )
    return 1 - removed / sizes.ffn_parameters


def _rounded_down(ratio: float) -> float:
    """To four digits, so that what a message names can be met."""
    return math.floor(ratio * 1e4) / 1e4


def to_widths(desired: list[float], budget: Budget, sizes: Sizes, *, counted: bool = False) -> Widths:
    """Round an allocation's desired widths to legal ones.

    ``nearest`` rounds each block alone, as the released code does: int((N keep + r/2) / r) r, and int(N keep) + 1
    where r = 1 (not where the allocator already ``counted`` neurons); never below the smallest legal width, which is
    where the released code keeps everything. ``exact`` then moves whole steps between blocks, the block furthest from
    its desired width first, until the total is within half a step of the request.
    """
    legal = [_legal(n, budget) for n in sizes.widths]
    if budget.rounding == "nearest":
        chosen = [
            _released_rule(want, n, options[0], budget.round_to, counted)
            for want, n, options in zip(desired, sizes.widths, legal, strict=True)
        ]
    else:
        chosen = _exact(desired, legal, sizes, sizes.ffn_parameters - budget.ratio * sizes.of_scope(budget.scope))
    removed = sum(
        (n - width) * cost for n, width, cost in zip(sizes.widths, chosen, sizes.neuron_parameters, strict=True)
    )
    requested: dict[str, Any] = {"ratio": budget.ratio, "scope": budget.scope, "round_to": budget.round_to}
    requested |= {"rounding": budget.rounding, "min_width": budget.min_width or budget.round_to}
    achieved = {
        "ratio": removed / sizes.of_scope(budget.scope),
        "removed_parameters": removed,
        **{f"{scope}_ratio": removed / sizes.of_scope(scope) for scope in ("ffn", "decoder", "model")},
    }
    return Widths(tuple(chosen), requested, achieved)


def _legal(n: int, budget: Budget) -> list[int]:
    smallest = budget.min_width or budget.round_to
    multiples = range(-(-smallest // budget.round_to) * budget.round_to, n, budget.round_to)
    return [*multiples, n]


def _widest_step(n: int, budget: Budget) -> int:
    """The most neurons between two legal widths that follow each other; 0 where nothing can be removed."""
    legal = _legal(n, budget)
    return max((after - before for before, after in pairwise(legal)), default=0)


def _released_rule(desired: float, n: int, smallest: int, round_to: int, counted: bool) -> int:
    if round_to > 1:
        width = int((desired + round_to / 2) / round_to) * round_to
    else:
        width = round(desired) if counted else int(desired) + 1
    return min(max(width, smallest), n)


def _exact(desired: list[float], legal: list[list[int]], sizes: Sizes, target: float) -> list[int]:
    costs = sizes.neuron_parameters
    at = [
        min(range(len(options)), key=lambda i, o=options, w=want: abs(o[i] - w))  # type: ignore[misc]
        for want, options in zip(desired, legal, strict=True)
    ]
    missing = target - sum(options[i] * cost for options, i, cost in zip(legal, at, costs, strict=True))
    while True:
        direction = 1 if missing > 0 else -1
        best: tuple[float, int] | None = None
        for block, (options, i) in enumerate(zip(legal, at, strict=True)):
            if not 0 <= i + direction < len(options):
                continue
            change = (options[i + direction] - options[i]) * costs[block]
            if abs(missing - change) >= abs(missing):
                continue
            lag = direction * (desired[block] - options[i]) / abs(options[i + direction] - options[i])
            if best is None or lag > best[0]:
                best = (lag, block)
        if best is None:
            return [options[i] for options, i in zip(legal, at, strict=True)]
        block = best[1]
        before = legal[block][at[block]]
        at[block] += direction
        missing -= (legal[block][at[block]] - before) * costs[block]
