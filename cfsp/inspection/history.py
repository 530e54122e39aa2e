"""What an earlier pruning took from a model folder, as the plan in it says; its tensors are not read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfsp.plan.check import BlockSizes
from cfsp.plan.history import history_of


@dataclass(frozen=True)
class Before:
    """A block before it was pruned: FFN neurons, KV groups, experts; None where that is not known, or it has none."""

    width: int | None = None
    kv_groups: int | None = None
    experts: int | None = None


@dataclass(frozen=True)
class History:
    """An earlier pruning.

    state: pruned, compensated or recovered; methods: pruners, in their order; parameters: before and after;
    blocks_before: number of blocks, of which those at the indices removed_blocks went whole; blocks: what each block
    that is there was.
    """

    state: str | None
    methods: tuple[str, ...]
    parameters: Mapping[str, int]
    blocks_before: int
    removed_blocks: tuple[int, ...]
    blocks: tuple[Before, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "methods": list(self.methods),
            "parameters": dict(self.parameters),
            "blocks_before": self.blocks_before,
            "removed_blocks": list(self.removed_blocks),
        }


def read_history(folder: Path, state: str | None, sizes: Sequence[BlockSizes]) -> History | None:
    """Return the history of ``folder``, whose blocks have these ``sizes``; None where nobody vouches for one.

    Raises:
        CheckpointError: a history that is damaged, or not that of the weights.
    """
    plan = history_of(folder, sizes, tensors=False)
    if plan is None:
        return None
    steps = plan.method.get("steps") or [plan.method]
    gone = tuple(index for index, block in enumerate(plan.blocks) if not block.keeps_block)
    staying = [index for index in range(len(plan.blocks)) if index not in gone]
    # Of several prunings the rows are the last one's, whose base was pruned already.
    rows = plan.details if len(steps) == 1 and len(plan.details) == len(plan.blocks) else None
    before = [Before() if rows is None else _row(rows[index]) for index in staying]
    methods = tuple(str(step["name"]) for step in _flat(steps))
    return History(state, methods, plan.parameters, len(plan.blocks), gone, tuple(before))


def _row(details: Mapping[str, Any]) -> Before:
    return Before(details.get("base_width"), details.get("base_kv_groups"), details.get("base_experts"))


def _flat(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A plan that was composed twice has its first two steps one level down."""
    return [inner for step in steps for inner in (_flat(step["steps"]) if step.get("steps") else [step])]
