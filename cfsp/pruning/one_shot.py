"""The one-shot engine: metric x allocator. CFSP, Wanda-SP, magnitude, uniform and random are settings of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from cfsp.allocate.budget import Sizes, keep_fraction, to_widths
from cfsp.components import component
from cfsp.importance.base import score
from cfsp.pruning.plan import BlockPlan, PruningPlan

if TYPE_CHECKING:
    from cfsp.pruning.base import PlanContext


@component
class OneShotPruner:
    """Score, allocate, round, keep the best neurons of each block.

    ``structure``, ``compensation`` and ``sequential`` state what is removed and what happens to the rest; FFN neurons
    without compensation, planned on dense activations, is what this engine does.
    """

    name: str
    structure: Literal["ffn"] = "ffn"
    compensation: Literal["none"] = "none"
    sequential: Literal[False] = False

    needs_model: ClassVar[bool] = False
    prunes: ClassVar[bool] = True

    def plan(self, context: PlanContext) -> PruningPlan:
        from cfsp.models.sample import weight_sample

        view, sizes = context.driver.view, Sizes.of(context.driver.view)
        keep = keep_fraction(context.budget, sizes)
        scores = score(view, context.statistics, context.importance)
        allocation = context.allocator.allocate(scores, sizes, keep)
        desired = [ratio * n for ratio, n in zip(allocation.keep.tolist(), sizes.widths, strict=True)]
        widths = to_widths(desired, context.budget, sizes, counted=allocation.counted)
        blocks, details = [], []
        for index, (values, width) in enumerate(zip(scores.neurons, widths.per_block, strict=True)):
            # A stable sort: equal scores keep the lower index, on every machine.
            kept = values.argsort(descending=True, stable=True)[:width].sort().values.tolist()
            blocks.append(BlockPlan(None if width == sizes.widths[index] else tuple(kept)))
            details.append(
                {
                    "distance": {metric: float(values[index]) for metric, values in scores.distances.items()},
                    "keep_ratio": float(allocation.keep[index]),
                    "width": width,
                    "base_width": sizes.widths[index],
                }
            )
        parameters = self._parameters(sizes, widths.achieved)
        return PruningPlan(
            base_model=context.base_model,
            base_fingerprint=context.base_fingerprint,
            method=context.method,
            blocks=tuple(blocks),
            requested=widths.requested,
            achieved=widths.achieved,
            parameters=parameters,
            details=tuple(details),
            base_sample=weight_sample(view),
        )

    @staticmethod
    def _parameters(sizes: Sizes, achieved: dict[str, Any]) -> dict[str, int]:
        before = sizes.model_parameters
        return {"before": before, "after": before - int(achieved["removed_parameters"])}
