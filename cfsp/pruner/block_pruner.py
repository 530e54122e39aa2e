"""BlockPruner (arXiv 2406.10594): greedy removal of attention and FFN submodules by the perplexity without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from cfsp.config.budget import Budget
from cfsp.config.components import component
from cfsp.config.contracts import Allocator, Unit
from cfsp.errors import BudgetError, UnsupportedModelError
from cfsp.plan.pruning_plan import BlockPlan
from cfsp.pruner.removal_compensation import CompensatesRemoval
from cfsp.pruner.units import free_blocks
from cfsp.sparsity.budget import Sizes, check_scope

if TYPE_CHECKING:
    from cfsp.architecture.views import BlockView, DecoderView
    from cfsp.plan.pruning_plan import PruningPlan
    from cfsp.pruner.base import PlanContext
    from cfsp.pruner.search import Candidate


@component
class BlockPruner(CompensatesRemoval):
    """Remove one submodule after another, each time the one without which the NLL is lowest.

    The removal ends where no submodule brings it nearer to the budget. A submodule that would overshoot the budget by
    more than is missing is not tried.

    Attributes:
        name: name of the method.
        submodules: kinds of submodules that may be removed.
        search_sequences: calibration sequences that the NLL is measured on, from the first; None: all.
        compensation: none, linear_map or scale (:mod:`cfsp.pruner.removed_block_map`).
        ridge: strength that holds the map of linear_map at the identity; auto: chosen by held-out sequences.
    """

    name: str
    submodules: Literal["both", "attention", "ffn"] = "both"
    search_sequences: Annotated[int, Field(ge=1)] | None = 32
    compensation: str = "none"
    ridge: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"] = "auto"

    prunes: ClassVar[bool] = True
    plans_with = ()
    removes = "removes whole submodules"

    def check(self, view: DecoderView, budget: Budget) -> None:
        """See :class:`cfsp.config.contracts.Pruner`."""
        if self.submodules != "ffn":
            check_scope(budget, f"pruner={self.name}", "pruner.submodules=ffn")
        lacking = [b.index for b in view.blocks if b.attention is None and not b.attention_removed]
        if lacking and self.submodules != "ffn":
            raise UnsupportedModelError(
                f"{type(view.model).__name__}: the attention of block {lacking[0]} was not recognised; use "
                "pruner.submodules=ffn"
            )
        scope = Sizes.of(view).scope_parameters(budget.scope)
        target = budget.ratio * scope
        everything = self._submodules(view, budget)
        attentions = [(b.index, "attention") for b in view.blocks if b.attention is not None]
        if attentions and set(attentions) <= set(everything):  # One must stay; all have the same size.
            everything.remove(attentions[-1])
        largest = max((self._count_parameters(view, [candidate]) for candidate in everything), default=0)
        smallest = min((self._count_parameters(view, [candidate]) for candidate in everything), default=0)
        most = self._count_parameters(view, everything)
        wish = f"sparsity.ratio={budget.ratio} of sparsity.scope={budget.scope}"
        if target > most + largest / 2:
            raise BudgetError(
                f"{wish} cannot be met: the submodules that may go (pruner.submodules={self.submodules}, "
                f"sparsity.protect={budget.shown_protect()}) are {most / scope:.4f} of it; use a smaller ratio"
            )
        if target < smallest / 2:
            raise BudgetError(
                f"{wish}: whole submodules are removed, and the smallest is {smallest / scope:.4f} of it; use "
                f"sparsity.ratio={smallest / scope:.4f}, or a pruner that removes less at a time"
            )

    def removed_units(self) -> tuple[Unit, ...]:
        return ("submodules",)

    def units(self, view: DecoderView, budget: Budget) -> dict[str, int]:
        """See :class:`cfsp.config.contracts.Pruner`."""
        free = free_blocks(view, budget)
        attentions = {"attentions": sum(block.attention is not None for block in free)}
        ffns = {"FFNs": sum(block.ffn is not None for block in free)}
        return {"attention": attentions, "ffn": ffns, "both": attentions | ffns}[self.submodules]

    def most_removable(self, view: DecoderView, budget: Budget) -> int:
        """See :class:`cfsp.config.contracts.Pruner`. One attention is always kept."""
        # Start-up time: loads torch.
        from cfsp.pruner.build_plan import removed_parameters

        free = free_blocks(view, budget)
        attentions = [block.index for block in view.blocks if block.attention is not None]
        staying = attentions[-1] if attentions and set(attentions) <= {block.index for block in free} else None
        most = 0
        for block in free:
            attention_goes = self.submodules != "ffn" and block.attention is not None and block.index != staying
            plan = BlockPlan(
                attention=not attention_goes and not block.attention_removed,
                ffn=block.ffn is not None and self.submodules == "attention",
            )
            most += sum(removed_parameters(view, block, plan).values())
        return most

    def biased_projections(self) -> tuple[str, ...]:
        return ()

    def keeps_blocks_equal(self, view: DecoderView, budget: Budget, allocator: Allocator) -> bool:
        """Return False: some blocks lose a submodule and others do not."""
        return False

    def plan(self, context: PlanContext) -> PruningPlan:
        """See :class:`cfsp.config.contracts.Pruner`."""
        # Start-up time: loads torch.
        from cfsp.pruner.search import KnownLosses, SubmoduleSearch

        view, budget = context.driver.view, context.budget
        ids = context.calibration.input_ids[: self.search_sequences]
        target = budget.ratio * Sizes.of(view).scope_parameters(budget.scope)
        everything = self._submodules(view, budget)

        def allowed(removed: Sequence[Candidate]) -> list[Candidate]:
            missing = abs(target - self._count_parameters(view, removed))
            return [
                candidate
                for candidate in everything
                if candidate not in removed
                and abs(target - self._count_parameters(view, [*removed, candidate])) < missing
                and self._keeps_attention(view, [*removed, candidate])
            ]

        with SubmoduleSearch(context.driver, ids, KnownLosses.of(context, ids, {})) as search:
            search.greedy(allowed)
        return self.complete(
            context,
            self._block_plans(view, search.removed),
            notes={"search_sequences": len(ids), "removed": search.history},
        )

    def _submodules(self, view: DecoderView, budget: Budget) -> list[Candidate]:
        """Return every submodule that may be removed."""
        kinds = {"both": ("attention", "ffn"), "attention": ("attention",), "ffn": ("ffn",)}[self.submodules]
        free = set(budget.free_blocks(len(view.blocks)))
        return [
            (b.index, kind) for b in view.blocks if b.index in free for kind in self._present_kinds(b) if kind in kinds
        ]

    @staticmethod
    def _present_kinds(block: BlockView) -> list[str]:
        return [*(["ffn"] if block.ffn is not None else []), *(["attention"] if block.attention is not None else [])]

    @staticmethod
    def _keeps_attention(view: DecoderView, removed: Sequence[Candidate]) -> bool:
        return any(not b.attention_removed and (b.index, "attention") not in removed for b in view.blocks)

    def _count_parameters(self, view: DecoderView, removed: Sequence[Candidate]) -> int:
        """Count the parameters of these submodules and of the norms that serve them alone."""
        # Start-up time: loads torch.
        from cfsp.pruner.build_plan import removed_parameters

        blocks = zip(view.blocks, self._block_plans(view, removed), strict=True)
        return sum(sum(removed_parameters(view, block, plan).values()) for block, plan in blocks)

    @staticmethod
    def _block_plans(view: DecoderView, removed: Sequence[Candidate]) -> list[BlockPlan]:
        removed_submodules = set(removed)
        return [
            BlockPlan(
                attention=not block.attention_removed and (block.index, "attention") not in removed_submodules,
                ffn=block.ffn is not None and (block.index, "ffn") not in removed_submodules,
            )
            for block in view.blocks
        ]
