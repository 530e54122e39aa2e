"""2SSP (arXiv 2501.17771): FFN neurons by activation norm, then attention submodules by greedy search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from cfsp.allocate.budget import Budget, Sizes, check_scope
from cfsp.components import component
from cfsp.errors import BudgetError, ConfigError, UnsupportedModelError
from cfsp.pruning.plan import BlockPlan

if TYPE_CHECKING:
    from cfsp.models.views import DecoderView
    from cfsp.pruning.base import PlanContext
    from cfsp.pruning.plan import PruningPlan
    from cfsp.pruning.search import Candidate


@dataclass(frozen=True)
class _Share:
    """How the target splits: attention submodules to remove, FFN rate, and neurons kept in every block."""

    n_attention: int
    ffn_rate: float
    width: int


@component
class TwoSSP:
    """Two stages, as in the authors' code.

    With s the target share of the decoder's parameters, B blocks of P parameters, F of them in the FFN and A in the
    attention (norms in neither): N* = round(B s^((F/A)/alpha)) attentions go (Eq. 5; ``attention_submodules`` forces
    the number), and every block keeps K = round(N (1 - r)) neurons, r = (round(s B P) - N* A) / (B F): the K with the
    largest mean L2 norm over a calibration sequence. Then, N* times, the attention goes without which the NLL of the
    first ``search_sequences`` calibration sequences is lowest. Because K is the same everywhere, the unit of its budget
    is one step of ``sparsity.round_to`` in every block.
    """

    name: str
    alpha: float = Field(default=1.5, gt=0, allow_inf_nan=False)
    attention_submodules: Annotated[int, Field(ge=0)] | None = None
    search_sequences: Annotated[int, Field(ge=1)] = 1
    compensation: str = "none"

    needs_model: ClassVar[bool] = True
    prunes: ClassVar[bool] = True
    plans_with: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        from cfsp.pruning.depth import refuse_compensation

        refuse_compensation(self.name, self.compensation, "also removes attention submodules")

    def check(self, view: DecoderView, budget: Budget) -> None:
        """See :class:`cfsp.pruning.base.Pruner`."""
        check_scope(budget, f"pruner={self.name}", "a pruner of FFN neurons (cfsp, flap)")
        self._share(view, budget)

    def plan(self, context: PlanContext) -> PruningPlan:
        """See :class:`cfsp.pruning.base.Pruner`."""
        from cfsp.importance.base import score
        from cfsp.importance.sequence_norm import SequenceNorm
        from cfsp.pruning.apply import sliced
        from cfsp.pruning.complete import complete
        from cfsp.pruning.search import KnownLosses, SubmoduleSearch

        view = context.driver.view
        share = self._share(view, context.budget)
        kept: list[tuple[int, ...] | None] = []
        for scores in score(view, context.statistics, SequenceNorm()).neurons:
            best = scores.argsort(descending=True, stable=True)[: share.width].sort().values.tolist()
            kept.append(None if share.width == len(scores) else tuple(best))
        ids = context.calibration.input_ids[: self.search_sequences]
        known = KnownLosses.of(context, ids, {"ffn_kept": kept})
        everything = [(block.index, "attention") for block in view.blocks]

        def allowed(removed: Sequence[Candidate]) -> list[Candidate]:
            return [c for c in everything if c not in removed] if len(removed) < share.n_attention else []

        decisions = [BlockPlan(neurons) for neurons in kept]
        with sliced(view, decisions), SubmoduleSearch(context.driver, ids, known) as search:
            search.greedy(allowed)
        gone = {block for block, _ in search.removed}
        blocks = [BlockPlan(neurons, attention=index not in gone) for index, neurons in enumerate(kept)]
        notes = {
            "attention_submodules": share.n_attention,
            "ffn_rate": share.ffn_rate,
            "width": share.width,
            "search_sequences": len(ids),
            "removed": search.history,
        }
        return complete(context, blocks, notes=notes)

    def _share(self, view: DecoderView, budget: Budget) -> _Share:
        """Split the target.

        Raises:
            ConfigError: protected blocks. UnsupportedModelError: unequal blocks. BudgetError: it cannot be met.
        """
        ffn, attention, whole, width = self._block(view, budget)
        n_blocks, sizes = len(view.blocks), Sizes.of(view)
        target = budget.ratio * sizes.of_scope(budget.scope) / sizes.decoder_parameters
        removed = round(target * n_blocks * whole)
        smallest = budget.min_width or budget.round_to
        legal = [*range(-(-smallest // budget.round_to) * budget.round_to, width, budget.round_to), width]
        # More than half a step below the smallest legal width is another budget.
        floor = max(legal[0] - budget.round_to / 2, 1)

        def rate(n: int) -> float:
            return (removed - n * attention) / (n_blocks * ffn)

        possible = [n for n in range(n_blocks) if rate(n) >= 0 and round(width * (1 - rate(n))) >= floor]
        n_attention = self.attention_submodules
        if n_attention is None:
            n_attention = round(n_blocks * target ** ((ffn / attention) / self.alpha))
        if n_attention not in possible:
            raise BudgetError(self._refusal(budget, n_attention, n_blocks, rate(n_attention), possible, legal[0]))
        wanted = round(width * (1 - rate(n_attention)))
        return _Share(n_attention, rate(n_attention), min(legal, key=lambda option: abs(option - wanted)))

    def _refusal(
        self, budget: Budget, n_attention: int, n_blocks: int, rate: float, possible: list[int], smallest: int
    ) -> str:
        said = "pruner.attention_submodules" if self.attention_submodules is not None else "Eq. 5"
        if n_attention >= n_blocks:
            why = "that is every one"
        elif rate < 0:
            why = "more than the whole target"
        else:
            why = f"and {smallest} neurons in every block are still too many"
        wish = f"sparsity.ratio={budget.ratio} of sparsity.scope={budget.scope}"
        if possible:
            way = f"use pruner.attention_submodules={min(possible, key=lambda n: abs(n - n_attention))}"
        else:
            way = "no other number can meet it; use a smaller sparsity.ratio, min_width or round_to"
        return f"{wish}: {said} removes {n_attention} of {n_blocks} attention submodules, {why}; {way}"

    def _block(self, view: DecoderView, budget: Budget) -> tuple[int, int, int, int]:
        """Parameters of FFN, attention and all of one block, and its width."""
        if budget.protect != "none":
            raise ConfigError(
                f"sparsity.protect={budget.shown_protect()}: pruner={self.name} keeps the same width in every block "
                "and protects none; use sparsity.protect=none, or another pruner"
            )
        found = set()
        for block in view.blocks:
            if block.ffn is None or block.attention is None:
                raise UnsupportedModelError(
                    f"{type(view.model).__name__}: pruner={self.name} needs an FFN and an attention with q, k, v and o "
                    f"projections in every block; block {block.index} lacks one; use another pruner"
                )
            ffn, attention = block.ffn.parameters, block.attention.parameters
            found.add((ffn, attention, sum(p.numel() for p in block.module.parameters()), block.ffn.width))
        if len(found) > 1:
            raise UnsupportedModelError(
                f"{type(view.model).__name__}: pruner={self.name} needs equal blocks, and these differ in size; use "
                "another pruner on a model that was pruned before"
            )
        return found.pop()
