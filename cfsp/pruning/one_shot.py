"""The one-shot engine: metric x allocator x structure x compensation.

CFSP, FLAP, Wanda-SP, LLM-Pruner, magnitude, uniform and random are settings of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from cfsp.allocate.budget import (
    Sizes,
    Structure,
    SubmoduleKind,
    Widths,
    check_scope,
    keep_fraction,
    legal_widths,
    submodules_of,
    to_widths,
)  # fmt: skip
from cfsp.allocate.search import Search
from cfsp.components import component
from cfsp.contracts import Pruner, Unit
from cfsp.errors import BudgetError, UnsupportedModelError
from cfsp.importance.base import Scores, score
from cfsp.models.latent import has_latent_attention
from cfsp.pruning.expert_choice import ExpertScore, Unseen, best_experts, score_whole_experts, with_unseen_kept
from cfsp.pruning.expert_limits import RANKED_BY_WEIGHTS, check_expert_settings, check_expert_widths, expert_notes
from cfsp.pruning.plan import BlockPlan
from cfsp.pruning.units import count_experts, count_kv_groups, count_neurons

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from cfsp.allocate.base import Allocation
    from cfsp.allocate.budget import Budget
    from cfsp.calibrate.gram import GramMatrices
    from cfsp.calibrate.statistics import BlockStatistics
    from cfsp.components import Component
    from cfsp.contracts import Allocator, NeuronImportance
    from cfsp.models.views import BlockView, DecoderView
    from cfsp.pruning.base import PlanContext
    from cfsp.pruning.plan import PruningPlan


@component
class OneShotPruner(Pruner):
    """Score, allocate, round, keep the best units of each block.

    structure: what may go: FFN neurons (ffn), whole KV groups of attention heads (heads), both (heads_ffn), or whole
    experts of mixtures (experts), by ``expert_score`` in the metric's place; those that saw no calibration token go
    first, or not at all (``unseen_experts``). Of the neurons of a mixture each expert keeps its own best ones, all
    experts of a block the same number; what is shared by all tokens beside them stays whole.
    compensation: bias adds what the removed units gave on average to the biases of down_proj and o_proj; least_squares
    refits their kept columns to give what all gave (``ridge``: towards the original columns, relative to the mean
    square of the inputs); gauss_newton, which needs ``sequential``, goes on from there and refits each FFN whole, gate
    and up too, in at most ``newton_steps`` steps of ``cg_iterations`` each (:mod:`cfsp.pruning.gauss_newton`).
    sequential: the units of a block are chosen (and compensated) on what the pruned blocks before it give, as FLAP's
    repository does for Wanda-SP; how much each block keeps still comes from the dense pass.
    correction: with both, each FFN is also refitted to make up for this share of what the pruned blocks before it have
    changed: 0: it gives what it would have given itself, 1: the dense model's hidden state leaves the block.
    """

    name: str
    structure: Structure = "ffn"
    compensation: Literal["none", "bias", "least_squares", "gauss_newton"] = "none"
    sequential: bool = False
    ridge: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-3
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
        """Configuration groups that it draws on: the metric scores neurons and heads, not experts."""
        return ("allocator",) if self.structure == "experts" else ("importance", "allocator")

    @property
    def requires(self) -> tuple[str, ...]:  # type: ignore[override]
        """Items of the calibration that the compensation needs."""
        return ("gram",) if self.refits else ()

    @property
    def refits(self) -> bool:
        """Whether the columns that stay are refitted."""
        return self.compensation in ("least_squares", "gauss_newton")

    def removed_units(self) -> tuple[Unit, ...]:
        """See :class:`cfsp.contracts.Pruner`."""
        if self.structure == "experts":
            return ("experts",)
        units: dict[SubmoduleKind, Unit] = {"ffn": "neurons", "attention": "kv_groups"}
        return tuple(units[kind] for kind in submodules_of(self.structure))

    def units(self, view: DecoderView, budget: Budget) -> dict[str, int]:
        """See :class:`cfsp.contracts.Pruner`."""
        if self.structure == "experts":
            return {"experts": count_experts(view, budget)}
        neurons = {} if self.structure == "heads" else {"neurons": count_neurons(view, budget)}
        groups = {} if self.structure == "ffn" else {"KV groups": count_kv_groups(view, budget)}
        return neurons | groups

    def most_removable(self, view: DecoderView, budget: Budget) -> int:
        """See :class:`cfsp.contracts.Pruner`. The smallest legal width of each block and one KV group stay."""
        part = Sizes.of(view, self.structure).only(budget.free_blocks(len(view.blocks)))
        legal = zip(part.widths, legal_widths(budget, part), part.neuron_parameters, strict=True)
        neurons = sum((width - options[0]) * cost for width, options, cost in legal)
        groups = zip(part.kv_groups, part.group_parameters, strict=True)
        return neurons + sum((n - 1) * cost for n, cost in groups if n)

    def biased_projections(self) -> tuple[str, ...]:
        """See :class:`cfsp.contracts.Pruner`."""
        if self.compensation != "bias":
            return ()
        names = {"ffn": "mlp.down_proj", "attention": "self_attn.o_proj"}
        return tuple(names[kind] for kind in submodules_of(self.structure))

    def keeps_blocks_equal(self, view: DecoderView, budget: Budget, allocator: Allocator) -> bool:
        """See :class:`cfsp.contracts.Pruner`. Rounding may still make equal shares unequal widths."""
        if not allocator.keeps_shares_equal or len(budget.free_blocks(len(view.blocks))) < len(view.blocks):
            return False
        sizes = Sizes.of(view, self.structure)
        try:
            keep = keep_fraction(budget, sizes)
        except BudgetError:  # which check() says
            return True
        groups = [keep * n for n in sizes.kv_groups]
        widths = to_widths([keep * n for n in sizes.widths], budget, sizes, groups=groups)
        return len(set(widths.per_block)) == len(set(widths.kv_groups)) == 1

    def objections(self, importance: Component[NeuronImportance], allocator: Component[Allocator]) -> Iterator[str]:
        """Object to gradients, which are those of the dense model, where pruned blocks change what is scored."""
        if self.sequential and "gradients" in importance.instance.requires:
            yield (
                f"pruner.sequential=true: importance._target_={importance.target} goes by gradients of the dense "
                "model, which pruned blocks do not change; use pruner.sequential=false, or a metric of activations "
                "(wanda, flap)"
            )

    def check_choices(
        self, view: DecoderView, importance: Component[NeuronImportance], allocator: Component[Allocator]
    ) -> None:
        """See :class:`cfsp.contracts.Pruner`."""
        check_expert_settings(view, self.structure, importance, allocator)

    def why_unused(self, group: str) -> str:
        """See :class:`cfsp.contracts.Pruner`."""
        return (
            f"pruner.structure=experts goes by pruner.expert_score and does not use {group}; leave it out, or use "
            "pruner=cfsp or one_shot"
        )

    @staticmethod
    def unused_settings(settings: Mapping[str, Any]) -> frozenset[str]:
        """See :class:`cfsp.contracts.Pruner`."""
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
        """See :class:`cfsp.pruning.base.Pruner`."""
        if self.structure in ("heads", "heads_ffn"):
            check_scope(budget, f"pruner.structure={self.structure}", "pruner.structure=ffn")
            if reason := heads_stay(view):
                raise UnsupportedModelError(
                    f"{type(view.model).__name__}: pruner.structure={self.structure} removes KV groups, but {reason}; "
                    "use pruner.structure=ffn"
                )
        if view.mixtures or self.structure == "experts":
            self._check_experts(view, budget)
        budget = self._with_biases(view, budget)
        keep_fraction(budget, Sizes.of(view, self.structure).only(budget.free_blocks(len(view.blocks))))

    def _check_experts(self, view: DecoderView, budget: Budget) -> None:
        name = type(view.model).__name__
        if not view.mixtures:
            raise UnsupportedModelError(
                f"{name}: pruner.structure=experts needs a mixture of experts, and no block is one; use "
                "pruner.structure=ffn"
            )
        if self.structure in ("ffn", "heads_ffn"):
            check_expert_widths(view, budget)
        if self.refits:
            raise UnsupportedModelError(
                f"{name}: pruner.compensation={self.compensation} refits single output projections, and block "
                f"{view.mixtures[0].index} is a mixture of experts; use pruner.compensation=none"
            )

    def plan(self, context: PlanContext) -> PruningPlan:
        """See :class:`cfsp.pruning.base.Pruner`."""
        from cfsp.models.streamed import resident
        from cfsp.pruning.complete import complete

        view, importance = context.driver.view, context.importance
        if self.structure == "experts":
            scores = score_whole_experts(view, context.statistics, self.expert_score)
        else:
            scores = score(
                view, context.statistics, importance, self.structure, context.gradients, context.scored, context.grams
            )
        widths, keep_ratios, notes = self._allocate(context, scores)
        if self.sequential:
            from cfsp.pruning.in_sequence import prune_in_sequence

            made = prune_in_sequence(self, context, widths)
            decisions, tensors = made.decisions, made.tensors
            notes |= made.notes
        else:
            decisions, tensors = [], {}
            for block, found in zip(view.blocks, context.statistics.blocks, strict=True):
                if self.structure == "experts":
                    n, own = widths.per_block[block.index], scores.neurons[block.index]
                    decisions.append(best_experts(block, own, n, found.experts, self.unseen_experts))
                else:
                    decisions.append(best(block, scores.units(block.index), scores.kv_groups[block.index], widths))
                if self.compensation != "none":
                    with resident(view, block):
                        tensors |= self.compensate(block, decisions[-1], found, context.grams)
        unseen = RANKED_BY_WEIGHTS
        if self.structure == "experts":
            unseen = f"{'stay' if self.unseen_experts == 'keep' else 'go first'} (pruner.unseen_experts)"
        notes |= expert_notes(view, context.statistics, decisions, self.compensation, unseen)
        return complete(context, decisions, keep_ratios=keep_ratios, notes=notes, tensors=tensors)

    def _allocate(self, context: PlanContext, scores: Scores) -> tuple[Widths, list[float], dict[str, Any]]:
        """Kept units per block, the kept share that the allocator asked for, and how a search got there.

        Protected blocks keep all.
        """
        view = context.driver.view
        budget = self._with_biases(view, context.budget)
        sizes = Sizes.of(view, self.structure)
        if self.structure == "experts" and self.unseen_experts == "keep":
            sizes = with_unseen_kept(view, sizes, context.statistics)
        free = budget.free_blocks(len(view.blocks))
        part = sizes.only(free)
        keep = keep_fraction(budget, part)
        if isinstance(context.allocator, Search):
            allocations = [one.allocate(scores.only(free), part, keep) for one in context.allocator.allocators()]
        else:
            allocations = [context.allocator.allocate(scores.only(free), part, keep)]
        chosen = [_rounded(allocations[0], budget, part)]
        chosen += [_beside(chosen[0].kv_groups, allocation, budget, part) for allocation in allocations[1:]]
        # One that cannot meet the budget with these groups is no start for a search.
        chosen = [widths for widths in chosen if widths.kv_groups == chosen[0].kv_groups]
        shares = allocations[0].keep.tolist()
        neurons, notes = chosen[0].per_block, dict[str, Any]()
        if isinstance(context.allocator, Search):
            neurons, history = self._searched(context, context.allocator, scores, chosen, budget, part, free)
            notes = {"searched_blocks": free, "search": history}
            shares = [width / n if n else 1.0 for width, n in zip(neurons, part.widths, strict=True)]
        widths, groups, kept = list(sizes.widths), list(sizes.kv_groups), [1.0] * len(view.blocks)
        for at, block in enumerate(free):
            widths[block], groups[block] = neurons[at], chosen[0].kv_groups[at]
            kept[block] = float(shares[at])
        return Widths(tuple(widths), tuple(groups)), kept, notes

    def _searched(
        self,
        context: PlanContext,
        search: Search,
        scores: Scores,
        starts: list[Widths],
        budget: Budget,
        part: Sizes,
        free: list[int],
    ) -> tuple[tuple[int, ...], list[dict[str, Any]]]:
        """FFN widths of the free blocks with the lowest loss, and the way there; KV groups are the first start's."""
        from cfsp.models.snapshot import restored
        from cfsp.pruning.width_search import WidthLosses

        view, found = context.driver.view, context.statistics.blocks
        sizes = view.widths

        def cut(block: BlockView, width: int) -> tuple[BlockPlan, dict[str, Tensor]]:
            decision = best_neurons(block, scores.units(block.index), width)
            return decision, self.compensate(block, decision, found[block.index], context.grams)

        ids = context.calibration.input_ids[: search.n_samples]
        with restored(view.model):
            # What the kept losses depend on beside widths and windows: scores and refits, and what both go by.
            stride = None if context.gram_wanted is None else context.gram_wanted.stride
            before = {**context.method, "allocator": None, "set": context.calibration.fingerprint, "stride": stride}
            losses = WidthLosses(context, ids, cut, before)

            def loss(widths: tuple[int, ...]) -> float:
                every = list(sizes)
                for at, block in enumerate(free):
                    every[block] = widths[at]
                return losses(tuple(every))

            return search.search(
                [start.per_block for start in starts], legal_widths(budget, part), part.neuron_parameters, loss
            )

    def _with_biases(self, view: DecoderView, budget: Budget) -> Budget:
        """The budget of the units alone: what the added biases cost (d each) goes in units too.

        Every block is reckoned to get them; one that loses nothing of a kind will not. Not in the FFN's scope, which
        counts what goes with the neurons.
        """
        if self.compensation != "bias" or budget.scope == "ffn":
            return budget
        channels = [view.blocks[block].channels for block in budget.free_blocks(len(view.blocks))]
        outputs = [found[kind].output for found in channels for kind in submodules_of(self.structure) if kind in found]
        added = sum(output.out_features for output in outputs if output.bias is None)
        return replace(budget, ratio=budget.ratio + added / Sizes.of(view).of_scope(budget.scope))

    def compensate(
        self, block: BlockView, decision: BlockPlan, found: BlockStatistics, grams: GramMatrices | None
    ) -> dict[str, Tensor]:
        """What the outputs of one block get for what they lose, in closed form: where gauss_newton starts too."""
        from cfsp.pruning.compensation import bias_compensation
        from cfsp.pruning.least_squares import least_squares_compensation

        if self.compensation == "bias":
            return bias_compensation(block, decision, found)
        if self.refits and grams is not None:
            return least_squares_compensation(block, decision, grams, self.ridge)
        return {}


def heads_stay(view: DecoderView) -> str | None:
    """Why KV groups cannot be removed from a model; None where they can."""
    for block in view.blocks:
        if block.attention is not None and block.attention.fixed:
            return f"the heads of block {block.index} cannot be taken apart: {block.attention.fixed}"
        if block.attention is None and not block.attention_removed:
            if has_latent_attention(block.module):
                return f"block {block.index} has multi-head latent attention, whose heads share one latent"
            return (
                f"block {block.index} has no attention that is recognised (q_proj, k_proj, v_proj or a fused qkv, and "
                "an output projection, of whole heads)"
            )
    return None


def _rounded(allocation: Allocation, budget: Budget, part: Sizes) -> Widths:
    groups = allocation.keep if allocation.keep_groups is None else allocation.keep_groups
    return to_widths(
        [share * n for share, n in zip(allocation.keep.tolist(), part.widths, strict=True)],
        budget,
        part,
        groups=[share * n for share, n in zip(groups.tolist(), part.kv_groups, strict=True)],
        counted=allocation.counted,
    )


def _beside(groups: tuple[int, ...], allocation: Allocation, budget: Budget, part: Sizes) -> Widths:
    """Widths that meet the budget where the KV groups are settled: the neurons alone follow ``allocation``.

    Exact rounding moves neurons between blocks until they make up for what the allocation's own groups had weighed.
    """
    share = [kept / n if n else 1.0 for kept, n in zip(groups, part.kv_groups, strict=True)]
    return _rounded(replace(allocation, keep_groups=allocation.keep.new_tensor(share)), budget, part)


def best(block: BlockView, neurons: Tensor, groups: Tensor, widths: Widths) -> BlockPlan:
    """The highest scores of a block; a KV group counts with the sum of its channels' scores."""
    of_ffn = best_neurons(block, neurons, widths.per_block[block.index])
    return replace(of_ffn, kv_groups_kept=_top(groups.sum(1), widths.kv_groups[block.index]))


def best_neurons(block: BlockView, scores: Tensor, width: int) -> BlockPlan:
    """The neurons with the highest scores [N], of a mixture the same number of each expert [E, N]."""
    if scores.dim() == 1:
        return BlockPlan(_top(scores, width))
    kept = [_top(row, width) for row in scores]
    return BlockPlan(expert_neurons_kept=None if kept[0] is None else tuple(row for row in kept if row is not None))


def _top(scores: Tensor, n: int) -> tuple[int, ...] | None:
    if n == len(scores):
        return None
    # A stable sort: equal scores keep the lower index, on every machine.
    return tuple(scores.argsort(descending=True, stable=True)[:n].sort().values.tolist())
