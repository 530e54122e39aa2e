"""The sparsity budget: the keep fraction for a ratio of a scope, and legal widths that meet it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from cfsp.config.budget import Budget, Scope, Structure
from cfsp.errors import BudgetError, ConfigError

if TYPE_CHECKING:
    from cfsp.architecture.views import DecoderView

SubmoduleKind = Literal["ffn", "attention"]


def removable_submodules(structure: Structure) -> tuple[SubmoduleKind, ...]:
    """Return the kinds of submodules whose units are removed in a structure."""
    kinds: dict[Structure, tuple[SubmoduleKind, ...]] = {"heads": ("attention",), "heads_ffn": ("ffn", "attention")}
    return kinds.get(structure, ("ffn",))


@dataclass(frozen=True)
class Sizes:
    """Removable units of each block, and sizes of the scopes in parameters.

    Attributes:
        widths: FFN neurons of each block; of a mixture a neuron of every expert counts as one. With structure experts
            these are whole experts instead. 0 where there are none, or none may go.
        neuron_parameters: parameters removed with one of these units.
        kv_groups: KV groups of each block; 0 where there are none, or none may go.
        group_parameters: parameters removed with one KV group.
        ffn_parameters: size of the scope ffn.
        decoder_parameters: size of the scope decoder.
        model_parameters: size of the scope model.
        expert_steps: with structure experts, for each block the fewest experts that may stay, and the number removed at
            a time; (0, 0) where the block is no mixture.
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
        """Return the sizes of a model for a pruner that removes units of ``structure``."""
        neurons, groups = view.units("neurons"), view.units("kv_groups")
        whole = structure == "experts"
        removable = view.units("experts") if whole else neurons
        zeros = (0,) * len(view.blocks)
        return Sizes(
            widths=zeros if structure == "heads" else tuple(units.n for units in removable),
            neuron_parameters=tuple(units.parameters for units in removable),
            kv_groups=tuple(units.n for units in groups) if structure in ("heads", "heads_ffn") else zeros,
            group_parameters=tuple(units.parameters for units in groups),
            ffn_parameters=sum(units.total for units in neurons),
            decoder_parameters=view.decoder_parameters,
            model_parameters=view.model_parameters,
            expert_steps=tuple((units.least, units.step) for units in removable) if whole else (),
        )

    def scope_parameters(self, scope: Scope) -> int:
        """Return the number of parameters of a scope."""
        totals = {"ffn": self.ffn_parameters, "decoder": self.decoder_parameters, "model": self.model_parameters}
        return totals[scope]

    def only(self, blocks: Sequence[int]) -> Sizes:
        """Return the sizes of these blocks alone; the sizes of the scopes stay."""
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
        """Number of removable parameters of each block."""
        rows = zip(self.widths, self.neuron_parameters, self.kv_groups, self.group_parameters, strict=True)
        return [n * cost + groups * group_cost for n, cost, groups, group_cost in rows]

    @property
    def removable(self) -> int:
        """Number of removable parameters of all blocks."""
        return sum(self.parameters)


@dataclass(frozen=True)
class Widths:
    """Kept units of each block.

    Attributes:
        per_block: FFN neurons; with structure experts, whole experts.
        kv_groups: KV groups.
    """

    per_block: tuple[int, ...]
    kv_groups: tuple[int, ...]


def keep_fraction(budget: Budget, sizes: Sizes) -> float:
    """Return the fraction of the removable parameters to keep so that ``ratio`` of the scope is removed.

    Raises:
        BudgetError: even the smallest legal widths remove less than that; names the largest ratio that can be met.
    """
    removed = budget.ratio * sizes.scope_parameters(budget.scope)
    slots = _slots(budget, sizes)
    most = sum((slot.n - slot.legal[0]) * slot.cost for slot in slots)
    step = max((slot.widest_step * slot.cost for slot in slots), default=0)
    if removed > most + step / 2 or removed >= sizes.removable:
        raise BudgetError(_unreachable(budget, sizes, most))
    return 1 - removed / sizes.removable


def check_scope(budget: Budget, pruner: str, instead: str) -> None:
    """Refuse to count by the FFN alone where a pruner removes more than FFN neurons.

    Args:
        budget: the requested budget.
        pruner: the setting that removes more, as on the command line.
        instead: a setting that removes FFN neurons alone, as on the command line.

    Raises:
        ConfigError: ``sparsity.scope`` is ffn.
    """
    if budget.scope == "ffn":
        raise ConfigError(
            f"sparsity.scope=ffn: {pruner} removes attention too, which that scope does not count; use "
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
    target = f"sparsity.ratio={budget.ratio} of sparsity.scope={budget.scope} cannot be met"
    largest = _rounded_down(most / sizes.scope_parameters(budget.scope))
    if not largest:
        widest = f"{max(sizes.widths)} experts" if sizes.expert_steps else f"width {max(sizes.widths)}"
        return (
            f"{target}: with {' and '.join(smallest)} nothing of blocks of {widest} and {max(sizes.kv_groups)} KV "
            f"groups can go; use {' or '.join(ways)}"
        )
    other = ", ".join([f"sparsity.ratio={largest:g} or less", *ways[:-1]])
    return f"{target}: going down to {' and '.join(smallest)} removes {largest:.4f} at most; use {other}, or {ways[-1]}"


def _rounded_down(ratio: float) -> float:
    """Round down to four digits, so that the ratio that a message names can be met."""
    return math.floor(ratio * 1e4) / 1e4


@dataclass(frozen=True)
class _Slot:
    """Removable units of one kind in one block.

    Attributes:
        kind: neurons (or experts) of the FFN, or KV groups of the attention.
        block: index of the block.
        n: number of units.
        cost: parameters removed with one unit.
        legal: numbers of units that may stay, ascending.
    """

    kind: Literal["ffn", "attention"]
    block: int
    n: int
    cost: int
    legal: list[int]

    @property
    def widest_step(self) -> int:
        """Return the most units between two neighbouring legal widths; 0 where nothing can be removed."""
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
    """Return the legal widths of each block, ascending; [0] where it has no FFN to prune."""
    legal_of = {slot.block: slot.legal for slot in _slots(budget, sizes) if slot.kind == "ffn"}
    return [legal_of.get(block, [0]) for block in range(len(sizes.widths))]


def to_widths(
    desired: Sequence[float],
    budget: Budget,
    sizes: Sizes,
    *,
    groups: Sequence[float] | None = None,
    counted: bool = False,
) -> Widths:
    """Round desired numbers of neurons (and of KV groups) to legal ones.

    Rounding ``nearest`` rounds each block alone, as the released code does: int((N keep + r/2) / r) r, and
    int(N keep) + 1 where r = 1 (not where the allocator already counted neurons). It never goes below the smallest
    legal width, where the released code keeps everything.

    Rounding ``exact`` first rounds the KV groups, and lets the neurons of the same block make up for it. Then whole
    steps of neurons move between blocks, the block furthest from its desired width first, until the total is within
    half a step of the request. Whole KV groups move only where no neurons can.

    Args:
        desired: number of neurons of each block.
        budget: the budget, with its rounding, smallest width and step.
        sizes: the removable units.
        groups: number of KV groups of each block; None: all.
        counted: whether the desired numbers are whole already.
    """
    slots = _slots(budget, sizes)
    slot_widths = [
        float(desired[slot.block]) if slot.kind == "ffn" else float((groups or sizes.kv_groups)[slot.block])
        for slot in slots
    ]
    if budget.rounding == "exact":
        slot_widths = _with_whole_groups(slot_widths, slots)
    if budget.rounding == "nearest":
        whole = counted or bool(sizes.expert_steps)
        chosen = [
            _released_rule(slot_width, slot, _step(slot, budget, sizes), whole or slot.kind != "ffn")
            for slot_width, slot in zip(slot_widths, slots, strict=True)
        ]
    else:
        chosen = _exact(slot_widths, slots, sizes.removable - budget.ratio * sizes.scope_parameters(budget.scope))
    kept = {(slot.kind, slot.block): width for slot, width in zip(slots, chosen, strict=True)}
    blocks = range(len(sizes.widths))
    return Widths(
        tuple(kept.get(("ffn", block), sizes.widths[block]) for block in blocks),
        tuple(kept.get(("attention", block), sizes.kv_groups[block]) for block in blocks),
    )


def _step(slot: _Slot, budget: Budget, sizes: Sizes) -> int:
    """Return the number of units that are removed at a time."""
    if slot.kind != "ffn":
        return 1
    return sizes.expert_steps[slot.block][1] if sizes.expert_steps else budget.round_to


def _released_rule(desired: float, slot: _Slot, round_to: int, counted: bool) -> int:
    if round_to > 1:
        width = int((desired + round_to / 2) / round_to) * round_to
    else:
        width = round(desired) if counted else int(desired) + 1
    return min(max(width, slot.legal[0]), slot.n)


def _with_whole_groups(wants: list[float], slots: list[_Slot]) -> list[float]:
    """Round the KV groups, and let the neurons of each block make up for their parameters."""
    adjusted, excess = list(wants), {}
    for index, slot in enumerate(slots):
        if slot.kind == "attention":
            adjusted[index] = _nearest(wants[index], slot.legal)
            excess[slot.block] = (adjusted[index] - wants[index]) * slot.cost
    for index, slot in enumerate(slots):
        if slot.kind == "ffn":
            adjusted[index] = wants[index] - excess.get(slot.block, 0) / slot.cost
    return adjusted


def _nearest(desired: float, legal: list[int]) -> int:
    return min(legal, key=lambda option: abs(option - desired))


def _exact(desired: list[float], slots: list[_Slot], target: float) -> list[int]:
    """Round to the nearest legal widths, then move single steps until the sum is as near to ``target`` as possible.

    A step of neurons goes before a step of KV groups, and the block that is furthest behind its desired width first.
    """
    at = [slot.legal.index(_nearest(width, slot.legal)) for width, slot in zip(desired, slots, strict=True)]
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
