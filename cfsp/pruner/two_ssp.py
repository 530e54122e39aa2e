"""2SSP (arXiv 2501.17771): FFN neurons by activation norm, then attention submodules by greedy search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from cfsp.architecture.latent import has_latent_attention
from cfsp.config.budget import Budget
from cfsp.config.components import component
from cfsp.config.contracts import Allocator, Pruner, Unit
from cfsp.errors import BudgetError, ConfigError, UnsupportedModelError
from cfsp.importance.base import score
from cfsp.importance.sequence_norm import SequenceNorm
from cfsp.pruner.choice import best_neurons
from cfsp.pruner.expert_limits import RANKED_BY_WEIGHTS, check_expert_widths, expert_notes
from cfsp.pruner.removal_compensation import refuse_compensation
from cfsp.pruner.units import count_neurons, free_blocks
from cfsp.sparsity.budget import Sizes, check_scope, legal_widths

if TYPE_CHECKING:
    from cfsp.architecture.views import DecoderView
    from cfsp.plan.pruning_plan import PruningPlan
    from cfsp.pruner.base import PlanContext
    from cfsp.pruner.search import Candidate


@dataclass(frozen=True)
class _Share:
    """Split of the target between attention submodules and FFN neurons.

    Attributes:
        n_attention: attention submodules to remove.
        ffn_rate: share of the neurons to remove.
        widths: kept neurons of each block.
    """

    n_attention: int
    ffn_rate: float
    widths: tuple[int, ...]

    @property
    def width(self) -> int:
        """Return the width of the first block, which is the width of all blocks of a dense model."""
        return self.widths[0]


@component
class TwoSSP(Pruner):
    """Remove FFN neurons, then attention submodules, as in the authors' code.

    With s the target share of the decoder's parameters, B blocks of P parameters, F of them in the FFN and A in the
    attention (norms in neither), N* = round(B s^((F/A)/alpha)) attentions are removed (Eq. 5). Every block keeps
    K = round(N (1 - r)) neurons, r = (round(s B P) - N* A) / (B F): the K with the largest mean L2 norm over a
    calibration sequence. Then, N* times, the attention without which the NLL is lowest is removed. Because K is the
    same everywhere, the unit of the budget is one step of ``sparsity.round_to`` in every block. Where dense blocks
    stand beside mixtures of experts, P, F and A are means over the blocks, K follows each block's own N, and F of a
    mixture counts the routed experts.

    Attributes:
        name: name of the method.
        alpha: exponent of Eq. 5.
        attention_submodules: N*; None: N* follows Eq. 5.
        search_sequences: calibration sequences that the NLL is measured on, from the first.
        compensation: only "none", because a removed attention leaves no output projection to carry a bias.
    """

    name: str
    alpha: float = Field(default=1.5, gt=0, allow_inf_nan=False)
    attention_submodules: Annotated[int, Field(ge=0)] | None = None
    search_sequences: Annotated[int, Field(ge=1)] = 1
    compensation: str = "none"

    prunes: ClassVar[bool] = True
    plans_with = ()

    def __post_init__(self) -> None:

        refuse_compensation(self.name, self.compensation, "also removes attention submodules")

    def check(self, view: DecoderView, budget: Budget) -> None:
        """See :class:`cfsp.config.contracts.Pruner`."""
        check_scope(budget, f"pruner={self.name}", "a pruner of FFN neurons (cfsp, flap)")
        if view.mixtures:
            check_expert_widths(view, budget)
        self._share(view, budget)

    def removed_units(self) -> tuple[Unit, ...]:
        return ("neurons", "submodules")

    def units(self, view: DecoderView, budget: Budget) -> dict[str, int]:
        """See :class:`cfsp.config.contracts.Pruner`."""
        attentions = sum(not block.attention_removed for block in free_blocks(view, budget))
        return {"neurons": count_neurons(view, budget), "attentions": attentions}

    def biased_projections(self) -> tuple[str, ...]:
        return ()

    def keeps_blocks_equal(self, view: DecoderView, budget: Budget, allocator: Allocator) -> bool:
        """Return False: some blocks lose their attention and others do not."""
        return False

    def plan(self, context: PlanContext) -> PruningPlan:
        """See :class:`cfsp.config.contracts.Pruner`."""
        # Start-up time: loads torch.
        from cfsp.pruner.apply import sliced
        from cfsp.pruner.build_plan import complete
        from cfsp.pruner.search import KnownLosses, SubmoduleSearch

        view = context.driver.view
        share = self._share(view, context.budget)
        scores = score(view, context.statistics, SequenceNorm())
        decisions = [best_neurons(b, scores.units(b.index), share.widths[b.index]) for b in view.blocks]
        ids = context.calibration.input_ids[: self.search_sequences]
        before: dict[str, Any] = {"ffn_kept": [plan.ffn_kept for plan in decisions]}
        if view.mixtures:
            before["expert_neurons_kept"] = [plan.expert_neurons_kept for plan in decisions]
        known = KnownLosses.of(context, ids, before)
        everything = [(block.index, "attention") for block in view.blocks]

        def allowed(removed: Sequence[Candidate]) -> list[Candidate]:
            return [c for c in everything if c not in removed] if len(removed) < share.n_attention else []

        with sliced(view, decisions), SubmoduleSearch(context.driver, ids, known) as search:
            search.greedy(allowed)
        blocks_without_attention = {block for block, _ in search.removed}
        blocks = [
            replace(plan, attention=index not in blocks_without_attention) for index, plan in enumerate(decisions)
        ]
        notes = {
            "attention_submodules": share.n_attention,
            "ffn_rate": share.ffn_rate,
            "width": share.width if len(set(share.widths)) == 1 else list(share.widths),
            "search_sequences": len(ids),
            "removed": search.history,
            **expert_notes(view, context.statistics, decisions, self.compensation, RANKED_BY_WEIGHTS),
        }
        return complete(context, blocks, notes=notes)

    def _share(self, view: DecoderView, budget: Budget) -> _Share:
        """Split the target between attention submodules and FFN neurons.

        Raises:
            ConfigError: blocks are protected.
            UnsupportedModelError: blocks are unequal.
            BudgetError: the target cannot be met.
        """
        ffn, attention, block_size = self._parts(view, budget)
        n_blocks, sizes = len(view.blocks), Sizes.of(view)
        target = budget.ratio * sizes.scope_parameters(budget.scope) / sizes.decoder_parameters
        # The paper's s * B * P with the mean P. It is not simplified to s times the total, which could round otherwise.
        removed = round(target * n_blocks * (block_size / n_blocks))
        legal = legal_widths(budget, sizes)

        def rate(n: int) -> float:
            return (removed - n * attention / n_blocks) / ffn

        def fits(n: int) -> bool:
            # A width more than half a step below the smallest legal one would miss the budget.
            floors = (max(options[0] - budget.round_to / 2, 1) for options in legal)
            desired = (round(width * (1 - rate(n))) for width in view.widths)
            return rate(n) >= 0 and all(width >= floor for width, floor in zip(desired, floors, strict=True))

        possible = [n for n in range(n_blocks) if fits(n)]
        n_attention = self.attention_submodules
        if n_attention is None:
            n_attention = round(n_blocks * target ** ((ffn / attention) / self.alpha))
        if n_attention not in possible:
            smallest = min(options[0] for options in legal)
            raise BudgetError(self._refusal(budget, n_attention, n_blocks, rate(n_attention), possible, smallest))
        widths = [
            _nearest(round(width * (1 - rate(n_attention))), options)
            for width, options in zip(view.widths, legal, strict=True)
        ]
        return _Share(n_attention, rate(n_attention), tuple(widths))

    def _refusal(
        self, budget: Budget, n_attention: int, n_blocks: int, rate: float, possible: list[int], smallest: int
    ) -> str:
        source = "pruner.attention_submodules" if self.attention_submodules is not None else "Eq. 5"
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
        return f"{wish}: {source} removes {n_attention} of {n_blocks} attention submodules, {why}; {way}"

    def _parts(self, view: DecoderView, budget: Budget) -> tuple[int, int, int]:
        """Count the parameters of all FFNs (of mixtures: routed experts), of all attentions, and of all blocks."""
        # Start-up time: loads torch.
        from cfsp.pruner.submodules import submodule_parameters

        if budget.protect != "none":
            raise ConfigError(
                f"sparsity.protect={budget.shown_protect()}: pruner={self.name} keeps the same width in every block "
                "and protects none; use sparsity.protect=none, or another pruner"
            )
        sizes_of_kind: dict[str, set[tuple[int, ...]]] = {}
        totals = [0, 0, 0]
        for block in view.blocks:
            if block.ffn is None or (block.attention is None and not has_latent_attention(block.module)):
                raise UnsupportedModelError(
                    f"{type(view.model).__name__}: pruner={self.name} needs an FFN and an attention with q, k, v and o "
                    f"projections in every block; block {block.index} lacks one; use another pruner"
                )
            attention = (
                submodule_parameters(block, "attention") if block.attention is None else block.attention.parameters
            )
            block_sizes = (block.ffn.parameters, attention, sum(p.numel() for p in block.module.parameters()))
            kind = "mixture" if block.experts is not None else "dense"
            sizes_of_kind.setdefault(kind, set()).add((*block_sizes, block.ffn.width))
            totals = [total + own for total, own in zip(totals, block_sizes, strict=True)]
        if any(len(sizes) > 1 for sizes in sizes_of_kind.values()):
            raise UnsupportedModelError(
                f"{type(view.model).__name__}: pruner={self.name} needs equal blocks, and these differ in size; use "
                "another pruner on a model that was pruned before"
            )
        return totals[0], totals[1], totals[2]


def _nearest(desired: int, options: Sequence[int]) -> int:
    return min(options, key=lambda option: abs(option - desired))
