"""Settings and refusals shared by the pruners that remove whole blocks or submodules and may make up for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from cfsp.config.contracts import Allocator, NeuronImportance, Pruner
from cfsp.errors import UnsupportedModelError

if TYPE_CHECKING:
    from cfsp.architecture.views import DecoderView
    from cfsp.config.components import Component
    from cfsp.plan.pruning_plan import BlockPlan, PruningPlan
    from cfsp.pruner.base import PlanContext

#: Compensations for whole blocks and submodules that are gone (:mod:`cfsp.pruner.removed_block_map`).
REMOVAL_COMPENSATIONS = ("none", "linear_map", "scale")


def refuse_compensation(name: str, compensation: str, reason: str, possible: Sequence[str] = ("none",)) -> None:
    """Refuse a compensation that a pruner cannot carry; ``reason`` is a clause for the message.

    Raises:
        ValueError: ``compensation`` is none of ``possible``.
    """
    if compensation not in possible:
        raise ValueError(
            f"pruner.compensation={compensation}: pruner={name} {reason}, which leave no output projection to carry a "
            f"bias; use pruner.compensation={' or '.join(possible)}, or a pruner that removes neurons or heads (flap, "
            "one_shot)"
        )


class CompensatesRemoval(Pruner):
    """Base of the pruners whose removed blocks or submodules a linear map or a factor may stand in for.

    Attributes:
        name: name of the method.
        compensation: none; linear_map: a closed-form map, folded into the last projection before each gap (ReplaceMe);
            scale: one factor for each gap, folded into the output projections behind it (Prune&Comp).
        ridge: strength that holds the map of linear_map at the identity, relative to the mean square of its inputs;
            auto: chosen for each gap by the error on every fourth sequence, which is held out; 0: as published.
        removes: a clause that says what is removed, for messages.
    """

    name: str
    compensation: str
    ridge: float | Literal["auto"]

    removes: ClassVar[str]

    def __post_init__(self) -> None:
        refuse_compensation(self.name, self.compensation, self.removes, REMOVAL_COMPENSATIONS)

    def check_choices(
        self, view: DecoderView, importance: Component[NeuronImportance], allocator: Component[Allocator]
    ) -> None:
        """Refuse models whose blocks do not carry the compensation, by running one block where weights are there.

        Raises:
            UnsupportedModelError: names what the compensation needs.
        """
        if self.compensation == "none":
            return
        self.check_parts(view)
        if view.weights.is_streamed or not next(view.model.parameters()).is_meta:
            # Start-up time: loads torch.
            from cfsp.pruner.residual_check import check_residual_stream

            check_residual_stream(view, self.compensation)

    def check_parts(self, view: DecoderView) -> None:
        """Refuse models with submodules whose output projection is not one matrix, from shapes alone.

        Raises:
            UnsupportedModelError: a block is a mixture of experts, or its attention was not recognised.
        """
        if self.compensation == "none":
            return
        model, wish = type(view.model).__name__, f"pruner.compensation={self.compensation}"
        if view.mixtures:
            raise UnsupportedModelError(
                f"{model}: {wish} is folded into single output projections, and block {view.mixtures[0].index} is a "
                "mixture of experts; use pruner.compensation=none"
            )
        blocks = [block.index for block in view.blocks if block.attention is None and not block.attention_removed]
        if blocks:
            raise UnsupportedModelError(
                f"{model}: {wish} is folded into output projections, and the attention of block {blocks[0]} was not "
                "recognised; use pruner.compensation=none"
            )

    @staticmethod
    def unused_settings(settings: Mapping[str, Any]) -> frozenset[str]:
        """See :class:`cfsp.config.contracts.Pruner`."""
        return frozenset() if settings.get("compensation") == "linear_map" else frozenset({"ridge"})

    def complete(self, context: PlanContext, blocks: Sequence[BlockPlan], notes: Mapping[str, Any]) -> PruningPlan:
        """Build the plan from the decisions on all blocks, with the tensors that make up for what is gone."""
        # Start-up time: loads torch.
        from cfsp.pruner.build_plan import complete

        if self.compensation == "none":
            return complete(context, blocks, notes=notes)
        from cfsp.pruner.removed_block_map import fold_linear_maps, fold_scales

        if self.compensation == "scale":
            tensors, facts = fold_scales(context, blocks)
        else:
            tensors, facts = fold_linear_maps(context, blocks, self.ridge)
        return complete(context, blocks, notes={**notes, self.compensation: facts}, tensors=tensors)
