"""The one-shot engine: metric x allocator x structure x compensation.

CFSP, FLAP, Wanda-SP, LLM-Pruner, magnitude, uniform and random are settings of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from cfsp.config.budget import Structure
from cfsp.config.components import component
from cfsp.config.contracts import Pruner, Unit
from cfsp.errors import BudgetError, UnsupportedModelError
from cfsp.importance.base import Scores, score
from cfsp.plan.pruning_plan import BlockPlan
from cfsp.pruner.choice import best, improve_kept_units
from cfsp.pruner.expert_choice import ExpertScore, Unseen, best_experts, keep_unseen_experts, score_whole_experts
from cfsp.pruner.expert_limits import (
    RANKED_BY_WEIGHTS,
    check_expert_settings,
    check_mixtures,
    expert_notes,
    few_token_notes,
    warn_of_few_tokens,
)
from cfsp.pruner.units import count_experts, count_kv_groups, count_neurons, why_heads_stay
from cfsp.pruner.width_choice import choose_widths
from cfsp.sparsity.budget import (
    Sizes,
    SubmoduleKind,
    Widths,
    check_scope,
    keep_fraction,
    legal_widths,
    removable_submodules,
    to_widths,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from cfsp.architecture.views import BlockView, DecoderView
    from cfsp.config.budget import Budget
    from cfsp.config.components import Component
    from cfsp.config.contracts import Allocator, NeuronImportance
    from cfsp.plan.pruning_plan import PruningPlan
    from cfsp.pruner.base import PlanContext
    from cfsp.pruner.closed_form import ClosedForm


@component
class OneShotPruner(Pruner):
    """Score the units, split the budget over the blocks, and keep the best units of each block.

    Each expert of a mixture keeps its own best neurons, all experts of a block the same number; shared experts stay
    whole.

    Attributes:
        name: name of the method.
        structure: units that may be removed: FFN neurons (ffn), whole KV groups of attention heads (heads), both
            (heads_ffn), or whole experts of mixtures (experts), which ``expert_score`` ranks instead of a metric.
        compensation: bias: the mean output of the removed units goes to the biases of down_proj and o_proj;
            least_squares: their kept columns are refitted to the output of all columns, in a mixture those of each
            expert; gauss_newton, which needs
            ``sequential``: all matrices of each FFN are then refitted, gate and up too
            (:mod:`cfsp.pruner.gauss_newton`).
        sequential: whether the units of a block are chosen (and compensated) on the hidden states of the pruned blocks
            before it, as in FLAP's repository for Wanda-SP. The widths still come from the dense pass.
        ridge: strength that holds refitted columns at the original ones, relative to the mean square of the inputs;
            auto: chosen for each projection by the error on every fourth sequence, which is held out.
        correction: share of the change by earlier pruned blocks that each FFN makes up for, where blocks are refitted
            in sequence; 0: the FFN gives its own dense output, 1: the dense model's hidden state leaves the block.
        newton_steps: steps of gauss_newton, at most.
        cg_iterations: iterations of conjugate gradients in each of these steps.
        expert_score: score of whole experts (:func:`cfsp.pruner.expert_choice.score_whole_experts`).
        unseen_experts: whether whole experts that saw no calibration token stay (keep), or go first (prune).
    """

    name: str
    structure: Structure = "ffn"
    compensation: Literal["none", "bias", "least_squares", "gauss_newton"] = "none"
    sequential: bool = False
    ridge: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"] = 1e-3
    correction: Annotated[float, Field(ge=0, le=1)] = 0.5
    newton_steps: Annotated[int, Field(ge=1)] = 2
    cg_iterations: Annotated[int, Field(ge=1)] = 20
    expert_score: ExpertScore = "contribution"
    unseen_experts: Unseen = "keep"

    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.structure == "experts" and self.compensation != "none":
            raise ValueError(
                f"pruner.compensation={self.compensation}: pruner.structure=experts removes whole experts, which leave "
                "no matrix to carry it; use pruner.compensation=none"
            )
        if self.compensation == "gauss_newton" and self.structure == "heads":
            raise ValueError(
                "pruner.compensation=gauss_newton: it refits FFNs that lose neurons, and pruner.structure=heads leaves "
                "all of them; use pruner.compensation=least_squares"
            )
        if self.compensation == "gauss_newton" and not self.sequential:
            raise ValueError(
                "pruner.compensation=gauss_newton: it is fitted to what enters each pruned FFN; use "
                "pruner.sequential=true, or pruner.compensation=least_squares"
            )
        if self.structure == "experts" and self.sequential:
            raise ValueError(
                "pruner.sequential=true: pruner.structure=experts goes by the tokens that the dense model routes; use "
                "pruner.sequential=false"
            )
        if self.structure != "experts" and self.unseen_experts == "prune":
            raise ValueError(
                f"pruner.unseen_experts=prune: pruner.structure={self.structure} removes no whole experts; use "
                "pruner.structure=experts, or pruner.unseen_experts=keep"
            )

    @property
    def plans_with(self) -> tuple[str, ...]:  # type: ignore[override]
        """Configuration groups that the method uses: whole experts need no metric."""
        return ("allocator",) if self.structure == "experts" else ("importance", "allocator")

    @property
    def requires(self) -> tuple[str, ...]:  # type: ignore[override]
        """Items of the calibration that the compensation needs."""
        held_out = ("held_out",) if self.ridge == "auto" else ()
        return ("gram", *held_out) if self.refits else ()

    @property
    def refits(self) -> bool:
        """Return whether the kept columns are refitted."""
        return self.compensation in ("least_squares", "gauss_newton")

    def removed_units(self) -> tuple[Unit, ...]:
        """See :class:`cfsp.config.contracts.Pruner`."""
        if self.structure == "experts":
            return ("experts",)
        units: dict[SubmoduleKind, Unit] = {"ffn": "neurons", "attention": "kv_groups"}
        return tuple(units[kind] for kind in removable_submodules(self.structure))

    def units(self, view: DecoderView, budget: Budget) -> dict[str, int]:
        """See :class:`cfsp.config.contracts.Pruner`."""
        if self.structure == "experts":
            return {"experts": count_experts(view, budget)}
        neurons = {} if self.structure == "heads" else {"neurons": count_neurons(view, budget)}
        groups = {} if self.structure == "ffn" else {"KV groups": count_kv_groups(view, budget)}
        return neurons | groups

    def most_removable(self, view: DecoderView, budget: Budget) -> int:
        """See :class:`cfsp.config.contracts.Pruner`. Each block keeps its smallest legal width and one KV group."""
        part = Sizes.of(view, self.structure).only(budget.free_blocks(len(view.blocks)))
        legal = zip(part.widths, legal_widths(budget, part), part.neuron_parameters, strict=True)
        neurons = sum((width - options[0]) * cost for width, options, cost in legal)
        groups = zip(part.kv_groups, part.group_parameters, strict=True)
        return neurons + sum((n - 1) * cost for n, cost in groups if n)

    def biased_projections(self) -> tuple[str, ...]:
        """See :class:`cfsp.config.contracts.Pruner`."""
        if self.compensation != "bias":
            return ()
        names = {"ffn": "mlp.down_proj", "attention": "self_attn.o_proj"}
        return tuple(names[kind] for kind in removable_submodules(self.structure))

    def keeps_blocks_equal(self, view: DecoderView, budget: Budget, allocator: Allocator) -> bool:
        """See :class:`cfsp.config.contracts.Pruner`. Rounding may still make equal shares unequal widths."""
        if not allocator.keeps_shares_equal or len(budget.free_blocks(len(view.blocks))) < len(view.blocks):
            return False
        sizes = Sizes.of(view, self.structure)
        try:
            keep = keep_fraction(budget, sizes)
        except BudgetError:  # check() reports this error.
            return True
        groups = [keep * n for n in sizes.kv_groups]
        widths = to_widths([keep * n for n in sizes.widths], budget, sizes, groups=groups)
        return len(set(widths.per_block)) == len(set(widths.kv_groups)) == 1

    def objections(self, importance: Component[NeuronImportance], allocator: Component[Allocator]) -> Iterator[str]:
        """Object to metrics of gradients with ``sequential``: gradients are computed on the dense model only."""
        if self.sequential and "gradients" in importance.instance.requires:
            yield (
                f"pruner.sequential=true: importance._target_={importance.target} goes by gradients of the dense "
                "model, which pruned blocks do not change; use pruner.sequential=false, or a metric of activations "
                "(wanda, flap)"
            )

    def check_choices(
        self, view: DecoderView, importance: Component[NeuronImportance], allocator: Component[Allocator]
    ) -> None:
        """See :class:`cfsp.config.contracts.Pruner`."""
        check_expert_settings(self.structure, allocator)

    def why_unused(self, group: str) -> str:
        """See :class:`cfsp.config.contracts.Pruner`."""
        return (
            f"pruner.structure=experts goes by pruner.expert_score and does not use {group}; leave it out, or use "
            "pruner=cfsp or one_shot"
        )

    @staticmethod
    def unused_settings(settings: Mapping[str, Any]) -> frozenset[str]:
        """See :class:`cfsp.config.contracts.Pruner`."""
        newton = settings.get("compensation") == "gauss_newton"
        refits = newton or settings.get("compensation") == "least_squares"
        experts = settings.get("structure") == "experts"
        used = {
            "ridge": refits,
            "correction": refits and settings.get("sequential"),
            "newton_steps": newton,
            "cg_iterations": newton,
            "expert_score": experts,
            "unseen_experts": experts,
        }
        return frozenset(key for key, is_used in used.items() if not is_used)

    def check(self, view: DecoderView, budget: Budget) -> None:
        """See :class:`cfsp.config.contracts.Pruner`."""
        if self.structure in ("heads", "heads_ffn"):
            check_scope(budget, f"pruner.structure={self.structure}", "pruner.structure=ffn")
            if reason := why_heads_stay(view):
                raise UnsupportedModelError(
                    f"{type(view.model).__name__}: pruner.structure={self.structure} removes KV groups, but {reason}; "
                    "use pruner.structure=ffn"
                )
        if view.mixtures or self.structure == "experts":
            check_mixtures(view, budget, self.structure, self.compensation)
        budget = self._with_biases(view, budget)
        keep_fraction(budget, Sizes.of(view, self.structure).only(budget.free_blocks(len(view.blocks))))

    def plan(self, context: PlanContext) -> PruningPlan:
        """See :class:`cfsp.config.contracts.Pruner`."""
        # Start-up time: loads torch.
        from cfsp.pruner.build_plan import complete

        view, statistics = context.driver.view, context.statistics
        scores = self._score(context)
        sizes = Sizes.of(view, self.structure)
        if self.structure == "experts" and self.unseen_experts == "keep":
            sizes = keep_unseen_experts(view, sizes, statistics)

        closed_form, of_candidates = self.closed_form(), self.closed_form()

        def compensate_candidate(block: BlockView, decision: BlockPlan, start: BlockPlan) -> dict[str, Tensor]:
            of_block = statistics.blocks[block.index]
            return of_candidates.compensate_candidate(block, decision, start, of_block, context.grams)

        chosen = choose_widths(context, scores, sizes, self._with_biases(view, context.budget), compensate_candidate)
        notes = dict(chosen.notes)
        if self.sequential:
            from cfsp.pruner.sequential import prune_in_sequence

            pruned = prune_in_sequence(self, context, chosen.widths)
            decisions, tensors = pruned.decisions, pruned.tensors
            notes |= pruned.notes
        else:
            decisions, tensors = self._decide(context, scores, chosen.widths, closed_form)
            notes |= {"chosen_ridge": closed_form.chosen_ridges} if closed_form.chosen_ridges else {}
            notes |= few_token_notes(view.blocks, context.grams, context.gram_request)
        unseen = RANKED_BY_WEIGHTS
        if self.structure == "experts":
            unseen = f"{'stay' if self.unseen_experts == 'keep' else 'go first'} (pruner.unseen_experts)"
        notes |= expert_notes(view, statistics, decisions, self.compensation, unseen)
        warn_of_few_tokens(notes, context.importance, self.compensation)
        return complete(context, decisions, keep_ratios=chosen.keep_ratios, notes=notes, tensors=tensors)

    def _score(self, context: PlanContext) -> Scores:
        view, statistics = context.driver.view, context.statistics
        if self.structure == "experts":
            return score_whole_experts(view, statistics, self.expert_score)
        return score(
            view, statistics, context.importance, self.structure, context.gradients, context.scored, context.grams
        )

    def _decide(
        self, context: PlanContext, scores: Scores, widths: Widths, closed_form: ClosedForm
    ) -> tuple[list[BlockPlan], dict[str, Tensor]]:
        """Choose the kept units of each block by the statistics of the dense model.

        Returns:
            The decision on each block, and the tensors that compensate for it.
        """
        view = context.driver.view
        decisions: list[BlockPlan] = []
        tensors: dict[str, Tensor] = {}
        for block, statistics in zip(view.blocks, context.statistics.blocks, strict=True):
            if self.structure == "experts":
                n, own_scores = widths.per_block[block.index], scores.neurons[block.index]
                decision = best_experts(block, own_scores, n, statistics.experts, self.unseen_experts)
            else:
                decision = best(block, scores.units(block.index), scores.kv_groups[block.index], widths)
                if context.importance.improves_kept:
                    with view.weights.resident(block):
                        decision = improve_kept_units(context, block, decision, statistics)
            decisions.append(decision)
            if self.compensation != "none":
                with view.weights.resident(block):
                    tensors |= closed_form.compensate(block, decision, statistics, context.grams)
        return decisions, tensors

    def _with_biases(self, view: DecoderView, budget: Budget) -> Budget:
        """Raise the ratio of the budget by the parameters of the added biases (d each).

        Every block is assumed to get them; a block that loses no unit of a kind gets none. Nothing is added for
        the scope ffn, which counts only the parameters that are removed with the neurons.
        """
        if self.compensation != "bias" or budget.scope == "ffn":
            return budget
        channels = [view.blocks[block].channels for block in budget.free_blocks(len(view.blocks))]
        outputs = [
            block[kind].output for block in channels for kind in removable_submodules(self.structure) if kind in block
        ]
        added = sum(output.out_features for output in outputs if output.bias is None)
        return replace(budget, ratio=budget.ratio + added / Sizes.of(view).scope_parameters(budget.scope))

    def closed_form(self) -> ClosedForm:
        """Return the compensation of single blocks."""
        # Start-up time: loads torch.
        from cfsp.pruner.closed_form import ClosedForm

        return ClosedForm(self.compensation, self.ridge)
