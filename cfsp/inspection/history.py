"""Earlier pruning of a model folder, as the plan in it tells; the plan's tensors are not read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfsp.plan.check import BlockSizes
from cfsp.plan.history import read_plan_history


@dataclass(frozen=True)
class OriginalBlockSizes:
    """Sizes of a block before it was pruned; None where a size is not known, or does not apply.

    Attributes:
        width: FFN neurons.
        kv_groups: KV groups.
        experts: routed experts.
    """

    width: int | None = None
    kv_groups: int | None = None
    experts: int | None = None


@dataclass(frozen=True)
class History:
    """Earlier pruning of a model.

    Attributes:
        state: pruned, compensated or recovered.
        methods: pruners, in order.
        parameters: parameters before and after.
        blocks_before: number of blocks before.
        removed_blocks: indices, among those, of the blocks that were removed as a whole.
        blocks: earlier sizes of each block that is still there.
    """

    state: str | None
    methods: tuple[str, ...]
    parameters: Mapping[str, int]
    blocks_before: int
    removed_blocks: tuple[int, ...]
    blocks: tuple[OriginalBlockSizes, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the history for JSON."""
        return {
            "state": self.state,
            "methods": list(self.methods),
            "parameters": dict(self.parameters),
            "blocks_before": self.blocks_before,
            "removed_blocks": list(self.removed_blocks),
        }


def read_history(folder: Path, state: str | None, sizes: Sequence[BlockSizes]) -> History | None:
    """Return the history of ``folder``, whose blocks have these ``sizes``; None where no marker of cfsp confirms one.

    Raises:
        CheckpointError: the history is damaged, or is not that of the weights.
    """
    plan = read_plan_history(folder, sizes, tensors=False)
    if plan is None:
        return None
    steps = plan.method.get("steps") or [plan.method]
    removed = tuple(index for index, block in enumerate(plan.blocks) if not block.keeps_block)
    kept = [index for index in range(len(plan.blocks)) if index not in removed]
    # After several prunings the rows are those of the last, whose base was pruned already.
    rows = plan.details if len(steps) == 1 and len(plan.details) == len(plan.blocks) else None
    before = [OriginalBlockSizes() if rows is None else _row(rows[index]) for index in kept]
    methods = tuple(str(step["name"]) for step in _flatten_steps(steps))
    return History(state, methods, plan.parameters, len(plan.blocks), removed, tuple(before))


def _row(details: Mapping[str, Any]) -> OriginalBlockSizes:
    return OriginalBlockSizes(details.get("base_width"), details.get("base_kv_groups"), details.get("base_experts"))


def _flatten_steps(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Flatten the steps of a plan; one that was composed twice has its first two steps one level down."""
    return [inner for step in steps for inner in (_flatten_steps(step["steps"]) if step.get("steps") else [step])]
