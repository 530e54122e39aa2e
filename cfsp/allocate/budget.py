"""The budget: what a ratio of a scope asks of the removable units, and whole widths that meet it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from cfsp.errors import BudgetError, ConfigError

if TYPE_CHECKING:
    from cfsp.models.views import DecoderView

Scope = Literal["ffn", "decoder", "model"]
Rounding = Literal["exact", "nearest"]
Structure = Literal["ffn", "heads", "heads_ffn", "experts"]
Protect = Literal["none", "auto"] | tuple[int, int]
SubmoduleKind = Literal["ffn", "attention"]

#: From this many blocks on, LLM-Pruner's published 4 first and 2 last blocks are left whole (facts of its README).
_DEEP = 24


def submodules_of(structure: Structure) -> tuple[SubmoduleKind, ...]:
    """Return the kinds of submodules that lose units."""
    kinds: dict[Structure, tuple[SubmoduleKind, ...]] = {"heads": ("attention",), "heads_ffn": ("ffn", "attention")}
    return kinds.get(structure, ("ffn",))


@dataclass(frozen=True)
class Budget:
    """Remove ``ratio`` of the parameters of ``scope``.

    scope ffn: the parameters that go with the FFN neurons; decoder: everything in the blocks; model: everything.
    Legal FFN widths of a block: the multiples of ``round_to`` from ``min_width`` (None: ``round_to``) up, and its own
    N; KV groups: 1 to all. ``protect``: (first, last) blocks that stay whole; auto: 4 and 2 from 24 blocks on, else 1
    and 1.
    """

    ratio: float
    scope: Scope = "ffn"
    round_to: int = 32
    rounding: Rounding = "exact"
    min_width: int | None = None
    protect: Protect = "none"

    def free_blocks(self, n_blocks: int) -> list[int]:
        """Indices of the blocks that may be pruned.

        Raises:
            ConfigError: every block is protected.
        """
        first, last = (0, 0) if self.protect == "none" else self._ends(n_blocks)
        free = list(range(first, n_blocks - last))
        if not free:
            raise ConfigError(
                f"sparsity.protect={self.shown_protect()}: leaves no block of {n_blocks} to prune; use smaller "
                "numbers or none"
            )
        return free

    def _ends(self, n_blocks: int) -> tuple[int, int]:
        if isinstance(self.protect, tuple):
            return self.protect
        return (4, 2) if n_blocks >= _DEEP else (1, 1)

    def shown_protect(self) -> str:
        """``protect`` as it is written on the command line."""
        return self.protect if isinstance(self.protect, str) else f"[{self.protect[0]},{self.protect[1]}]"

    def requested(self) -> dict[str, Any]:
        """What was asked for, for the plan."""
        return {
            "ratio": self.ratio,
            "scope": self.scope,
            "round_to": self.round_to,
            "rounding": self.rounding,
            "min_width": self.min_width or self.round_to,
            "protect": self.protect if isinstance(self.protect, str) else list(self.protect),
        }


@dataclass(frozen=True)
class Sizes:
    """The countable side of a model: the units of each block that ``structure`` may remove; totals of the scopes.

    ``widths``: FFN neurons, ``kv_groups``: KV groups; 0 where they are not there or not to be removed. Of a mixture of
    experts a neuron is one of every expert, and under structure experts ``widths`` are whole experts instead, of which
    ``expert_steps`` says per block how few may stay, and how many leave at a time; (0, 0) where it is no mixture.
    """

    widths: tuple[int, ...]
    neuron_parameters: tuple[int, ...]
    kv_groups: tuple[int, ...]
    group_parameters: tuple[int, ...]
    ffn_parameters: int
    decoder_parameters: int
    model_parameters: int
    expert_steps: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of(view: DecoderView, structure: Structure = "ffn") -> Sizes:
        costs = [block.ffn.neuron_parameters if block.ffn is not None else 0 for block in view.blocks]
        group_costs = [block.attention.group_parameters if block.attention is not None else 0 for block in view.blocks]
        nothing = (0,) * len(view.blocks)
        widths = nothing if structure == "heads" else tuple(view.widths)
        unit_costs: tuple[int, ...] = tuple(costs)
        steps: tuple[tuple[int, int], ...] = ()
        if structure == "experts":
            mixtures = [block.experts for block in view.blocks]
            widths = tuple(0 if one is None else one.n_experts for one in mixtures)
            unit_costs = tuple(0 if one is None else one.expert_parameters for one in mixtures)
            steps = tuple((0, 0) if one is None else (one.least_experts, one.groups) for one in mixtures)
        return Sizes(
            widths=widths,
            neuron_parameters=unit_costs,
            kv_groups=tuple(view.kv_groups) if structure in ("heads", "heads_ffn") else nothing,
            group_parameters=tuple(group_costs),
            ffn_parameters=sum(n * cost for n, cost in zip(view.widths, costs, strict=True)),
            decoder_parameters=view.decoder_parameters,
            model_parameters=view.model_parameters,
            expert_steps=steps,
        )

    def of_scope(self, scope: Scope) -> int:
        """Parameters of a scope."""
        totals = {"ffn": self.ffn_parameters, "decoder": self.decoder_parameters, "model": self.model_parameters}
        return totals[scope]

    def only(self, blocks: Sequence[int]) -> Sizes:
        """The same with these blocks alone; the scopes' totals stay."""
        return replace(
            self,
            widths=tuple(self.widths[block] for block in blocks),
            neuron_parameters=tuple(self.neuron_parameters[block] for block in blocks),
            kv_groups=tuple(self.kv_groups[block] for block in blocks),
            group_parameters=tuple(self.group_parameters[block] for block in blocks),
            expert_steps=tuple(self.expert_steps[block] for block in blocks) if self.expert_steps else (),
        )

    @property
    def parameters(self) -> list[int]:
        """Removable parameters of each block."""
        rows = zip(self.widths, self.neuron_parameters, self.kv_groups, self.group_parameters, strict=True)
        return [n * cost + groups * group_cost for n, cost, groups, group_cost in rows]

    @property
    def removable(self) -> int:
        """Removable parameters of all blocks."""
        return sum(self.parameters)


@dataclass(frozen=True)
class Widths:
    """Kept FFN neurons and kept KV groups of each block."""

    per_block: tuple[int, ...]
    kv_groups: tuple[int, ...]


def keep_fraction(budget: Budget, sizes: Sizes) -> float:
    """The fraction of the removable parameters to keep so that ``ratio`` of the scope goes.

    Raises:
        BudgetError: not even the smallest legal widths remove that much; names the largest ratio that can be met.
    """
    removed = budget.ratio * sizes.of_scope(budget.scope)
    slots = _slots(budget, sizes)
    most = sum((slot.n - slot.legal[0]) * slot.cost for slot in slots)
    step = max((slot.widest_step * slot.cost for slot in slots), default=0)
    if removed > most + step / 2 or removed >= sizes.removable:
        raise BudgetError(_unreachable(budget, sizes, most))
    return 1 - removed / sizes.removable


def check_scope(budget: Budget, what: str, instead: str) -> None:
    """Refuse to count by the FFN where ``what`` removes more than FFN neurons; ``instead`` is the other way out.

    Raises:
        ConfigError: ``sparsity.scope`` is ffn.
    """
    if budget.scope == "ffn":
        raise ConfigError(
            f"sparsity.scope=ffn: {what} removes attention too, which that scope does not count; use "
            f"sparsity.scope=decoder or model, or {instead}"
        )


def _unreachable(budget: Budget, sizes: Sizes, most: int) -> str:
    neurons, heads = any(sizes.widths), any(sizes.kv_groups)
    smallest = [f"sparsity.min_width={budget.min_width or budget.round_to} sparsity.round_to={budget.round_to}"]
    ways = ["a smaller min_width or round_to"]
    if sizes.expert_steps:
        least = max(step[0] for step in sizes.expert_steps)
        smallest, ways = [f"the {least} experts that must stay in a block"], ["pruner.structure=ffn"]
    if not neurons:
        smallest, ways = [], ["pruner.structure=heads_ffn"]
    if heads:
        smallest.append("one KV group in a block")
    if budget.protect != "none":
        smallest.append(f"sparsity.protect={budget.shown_protect()}")
        ways.append("sparsity.protect=none")
    if budget.scope != "ffn" and not heads:
        ways.append("sparsity.scope=ffn")
    wish = f"sparsity.ratio={budget.ratio} of sparsity.scope={budget.scope} cannot be met"
    largest = _rounded_down(most / sizes.of_scope(budget.scope))
    if not largest:
        widest = f"{max(sizes.widths)} experts" if sizes.expert_steps else f"width {max(sizes.widths)}"
        return (
            f"{wish}: with {' and '.join(smallest)} nothing of blocks of {widest} and {max(sizes.kv_groups)} KV groups "
            f"can go; use {' or '.join(ways)}"
        )
    other = ", ".join([f"sparsity.ratio={largest:g} or less", *ways[:-1]])
    return f"{wish}: going down to {' and '.join(smallest)} removes {largest:.4f} at most; use {other}, or {ways[-1]}"


def _rounded_down(ratio: float) -> float:
    """To four digits, so that what a message names can be met."""
    return math.floor(ratio * 1e4) / 1e4


@dataclass(frozen=True)
class _Slot:
    """The removable units of one kind in one block: how many, what one costs, how many may stay."""

    kind: Literal["ffn", "attention"]
    block: int
    n: int
    cost: int
    legal: list[int]

    @property
    def widest_step(self) -> int:
        """The most units between two legal widths that follow each other; 0 where nothing can be removed."""
        return max((after - before for before, after in pairwise(self.legal)), default=0)


def _slots(budget: Budget, sizes: Sizes) -> list[_Slot]:
    smallest = budget.min_width or budget.round_to
    start = -(-smallest // budget.round_to) * budget.round_to
    whole = bool(sizes.expert_steps)
    slots = [
        _Slot("ffn", block, n, cost, _legal(n, *(sizes.expert_steps[block] if whole else (start, budget.round_to))))
        for block, (n, cost) in enumerate(zip(sizes.widths, sizes.neuron_parameters, strict=True))
        if n
    ]
    slots += [
        _Slot("attention", block, n, cost, list(range(1, n + 1)))
        for block, (n, cost) in enumerate(zip(sizes.kv_groups, sizes.group_parameters, strict=True))
        if n
    ]
    return slots


def _legal(n: int, smallest: int, step: int) -> list[int]:
    return [*range(smallest, n, step), n]


def legal_widths(budget: Budget, sizes: Sizes) -> list[list[int]]:
    """Of each block, ascending; [0] where it has no FFN to prune."""
    found = {slot.block: slot.legal for slot in _slots(budget, sizes) if slot.kind == "ffn"}
    return [found.get(block, [0]) for block in range(len(sizes.widths))]


def to_widths(
    desired: Sequence[float],
    budget: Budget,
    sizes: Sizes,
    *,
    groups: Sequence[float] | None = None,
    counted: bool = False,
) -> Widths:
    """Round desired numbers of neurons (and of KV ``groups``) per block to legal ones.

    ``nearest`` rounds each block alone, as the released code does: int((N keep + r/2) / r) r, and int(N keep) + 1
    where r = 1 (not where the allocator already ``counted`` neurons); never below the smallest legal width, which is
    where the released code keeps everything. ``exact`` rounds the KV groups, lets the neurons of the same block make up
    for it, and then moves whole steps of neurons between blocks, the one furthest from its desired width first, until
    the total is within half a step of the request; whole groups move only where no neurons can.
    """
    slots = _slots(budget, sizes)
    wants = [
        float(desired[slot.block]) if slot.kind == "ffn" else float((groups or sizes.kv_groups)[slot.block])
        for slot in slots
    ]
    if budget.rounding == "exact":
        wants = _made_up(wants, slots)
    if budget.rounding == "nearest":
        whole = counted or bool(sizes.expert_steps)
        chosen = [
            _released_rule(want, slot, _step(slot, budget, sizes), whole or slot.kind != "ffn")
            for want, slot in zip(wants, slots, strict=True)
        ]
    else:
        chosen = _exact(wants, slots, sizes.removable - budget.ratio * sizes.of_scope(budget.scope))
    kept = {(slot.kind, slot.block): width for slot, width in zip(slots, chosen, strict=True)}
    blocks = range(len(sizes.widths))
    return Widths(
        tuple(kept.get(("ffn", block), sizes.widths[block]) for block in blocks),
        tuple(kept.get(("attention", block), sizes.kv_groups[block]) for block in blocks),
    )


def _step(slot: _Slot, budget: Budget, sizes: Sizes) -> int:
    """The units that leave at a time."""
    if slot.kind != "ffn":
        return 1
    return sizes.expert_steps[slot.block][1] if sizes.expert_steps else budget.round_to


def _released_rule(desired: float, slot: _Slot, round_to: int, counted: bool) -> int:
    if round_to > 1:
        width = int((desired + round_to / 2) / round_to) * round_to
    else:
        width = round(desired) if counted else int(desired) + 1
    return min(max(width, slot.legal[0]), slot.n)


def _made_up(wants: list[float], slots: list[_Slot]) -> list[float]:
    """Wanted numbers where the KV groups are whole and the neurons of their block keep its wanted parameters."""
    made, excess = list(wants), {}
    for index, slot in enumerate(slots):
        if slot.kind == "attention":
            made[index] = _nearest(wants[index], slot.legal)
            excess[slot.block] = (made[index] - wants[index]) * slot.cost
    for index, slot in enumerate(slots):
        if slot.kind == "ffn":
            made[index] = wants[index] - excess.get(slot.block, 0) / slot.cost
    return made


def _nearest(want: float, legal: list[int]) -> int:
    return min(legal, key=lambda option: abs(option - want))


def _exact(desired: list[float], slots: list[_Slot], target: float) -> list[int]:
    at = [slot.legal.index(_nearest(want, slot.legal)) for want, slot in zip(desired, slots, strict=True)]
    missing = target - sum(slot.legal[i] * slot.cost for slot, i in zip(slots, at, strict=True))
    while True:
        direction = 1 if missing > 0 else -1
        best: tuple[bool, float, int] | None = None
        for index, (slot, i) in enumerate(zip(slots, at, strict=True)):
            if not 0 <= i + direction < len(slot.legal):
                continue
            step = slot.legal[i + direction] - slot.legal[i]
            if abs(missing - step * slot.cost) >= abs(missing):
                continue
            lag = direction * (desired[index] - slot.legal[i]) / abs(step)
            if best is None or (slot.kind == "ffn", lag) > best[:2]:
                best = (slot.kind == "ffn", lag, index)
        if best is None:
            return [slot.legal[i] for slot, i in zip(slots, at, strict=True)]
        index = best[2]
        before = slots[index].legal[at[index]]
        at[index] += direction
        missing -= (slots[index].legal[at[index]] - before) * slots[index].cost
