"""The candidates of a search: how many units each submodule may keep, and the moves between them that keep the size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

#: Kept units of each slot of a search space.
Counts = tuple[int, ...]


@dataclass(frozen=True)
class SearchSpace:
    """Numbers of units that a search may choose from.

    A slot is the FFN of one block, or the attention of one block. A candidate is one number of kept units per slot.

    Attributes:
        kinds: kind of each slot; all FFNs come before all attentions.
        blocks: index of the block of each slot.
        legal: numbers of units that each slot may keep, ascending.
        costs: parameters of one unit of each slot.
        starts: candidates that meet the budget, to begin with.
    """

    kinds: tuple[Literal["ffn", "attention"], ...]
    blocks: tuple[int, ...]
    legal: tuple[tuple[int, ...], ...]
    costs: tuple[int, ...]
    starts: tuple[Counts, ...]

    @property
    def slack(self) -> float:
        """Tolerance of the budget in parameters: half of the largest step of an FFN, of an attention without FFNs."""
        kind = self.kinds[0] if self.kinds else "ffn"
        gaps = [
            (after - before) * cost
            for row, cost, own in zip(self.legal, self.costs, self.kinds, strict=True)
            for before, after in pairwise(row)
            if own == kind
        ]
        return max(gaps, default=0) / 2

    def parameters(self, counts: Sequence[int]) -> int:
        """Return the parameters of the kept units."""
        return sum(count * cost for count, cost in zip(counts, self.costs, strict=True))

    def with_moved_steps(self, counts: Counts, slot: int, steps: int) -> Counts | None:
        """Return the counts with ``steps`` legal steps more in one slot (fewer, if negative); None if impossible."""
        row = self.legal[slot]
        position = row.index(counts[slot]) + steps if counts[slot] in row else -1
        if not 0 <= position < len(row):
            return None
        return (*counts[:slot], row[position], *counts[slot + 1 :])

    def with_transferred_steps(self, counts: Counts, giver: int, taker: int, steps: int, target: int) -> Counts | None:
        """Move ``steps`` legal steps of one slot to another, which grows by as many parameters as its steps allow.

        Args:
            counts: the candidate to change.
            giver: slot that keeps fewer units afterwards.
            taker: slot that keeps more.
            steps: number of legal steps of the giver.
            target: parameters that all slots together should keep.

        Returns:
            The counts afterwards; None where a slot cannot move so far, or the size would leave ``target`` by more
            than :attr:`slack`.
        """
        smaller = self.with_moved_steps(counts, giver, -steps)
        if smaller is None:
            return None
        freed = (counts[giver] - smaller[giver]) * self.costs[giver]
        desired = counts[taker] + freed / self.costs[taker]
        count = min(self.legal[taker], key=lambda legal: abs(legal - desired))
        candidate = (*smaller[:taker], count, *smaller[taker + 1 :])
        if count <= counts[taker] or abs(self.parameters(candidate) - target) > self.slack:
            return None
        return candidate

    def describe(self, counts: Counts, measure: str, value: float) -> dict[str, object]:
        """Return one step of a search for the notes of a plan."""
        by_kind = {
            kind: [count for count, own in zip(counts, self.kinds, strict=True) if own == kind]
            for kind in ("ffn", "attention")
        }
        groups = {"kv_groups": by_kind["attention"]} if by_kind["attention"] else {}
        return {"widths": by_kind["ffn"], **groups, measure: value}
