"""Sequential pruning: the units of each block are chosen on the hidden states of the pruned blocks before it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from cfsp.architecture.activation import activation_of
from cfsp.architecture.ffn import FFN, ffn_of
from cfsp.calibration.collectors import collecting
from cfsp.calibration.ffn_pairs import FFNPairs, capturing_ffn
from cfsp.calibration.gram import HELD_OUT, CrossSums, gram_sums, reported
from cfsp.calibration.gram_store import InMemory
from cfsp.importance.base import score_block
from cfsp.model.snapshot import restored
from cfsp.plan.pruning_plan import BlockPlan
from cfsp.plan.slice_block import slice_block
from cfsp.plan.slicing import set_output_weight
from cfsp.pruner.choice import best, improve_kept_units
from cfsp.pruner.expert_limits import few_token_notes
from cfsp.pruner.ffn_refit import refit_ffn
from cfsp.pruner.least_squares import chosen_correction_ridge, corrected

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.activation import Activation
    from cfsp.calibration.ffn_pairs import FFNCapture
    from cfsp.model.driver import BlockStep
    from cfsp.model.hidden_states import HiddenStates
    from cfsp.pruner.base import PlanContext
    from cfsp.pruner.one_shot import OneShotPruner
    from cfsp.sparsity.budget import Widths

log = logging.getLogger(__name__)

#: Tolerance, relative to the shift of the FFN's output, within which half of the block's outputs must follow it.
_ROUNDING = 0.02
#: After so many blocks in a row whose Gauss-Newton refit raised the error on held-out tokens, no further one is tried.
_MOST_REFUSED = 3
#: Damping of Gauss-Newton's steps where the ridge of least squares is chosen by held-out tokens.
_DAMPING = 1e-3
#: Fitted tokens for each neuron below which a warning says that a refit of whole FFNs may not hold on other tokens. It
#: only warns: the tokens that are held out decide.
_TOKENS_PER_NEURON = 32


@dataclass
class InSequence:
    """Decisions of sequential pruning.

    Attributes:
        decisions: the decision on each block.
        tensors: tensor name -> the tensor that replaces the base model's.
        notes: facts for the plan on how the refits went.
    """

    decisions: list[BlockPlan] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def prune_in_sequence(pruner: OneShotPruner, context: PlanContext, widths: Widths) -> InSequence:
    """Choose the units of one block after another, and restore the model at the end.

    Where FFNs correct a share of the error of earlier pruned blocks (``pruner.correction``), the hidden states of the
    dense model are computed beside those of the pruned one.
    """
    driver, ids, gram_request = context.driver, context.calibration.input_ids, context.gram_request
    pruned, newton, closed_form = InSequence(), _NewtonReport(), pruner.closed_form()
    few_tokens: dict[str, list[int]] = {}
    if pruner.compensation == "gauss_newton":
        _warn_of_few_tokens(context)
    correcting = pruner.refits and pruner.correction > 0 and pruner.structure != "heads"
    dense = driver.hidden_states() if correcting else None
    with restored(driver.view.model):
        for step in driver.steps(ids, "prune in sequence"):
            block = step.block
            refit: _NoRefit = _NoRefit()  # the pairs of the last block are freed before the dense model runs
            if dense is not None:
                if not len(dense):
                    for state in step.inputs:
                        dense.append(state.clone())
                step.run_alongside(dense)
            if pruner.refits and isinstance(block.ffn, FFN) and widths.per_block[block.index] < block.ffn.width:
                newton_is_tried = pruner.compensation == "gauss_newton" and not newton.gave_up
                refit = _FFNRefit(pruner, context, step, block.ffn, dense, newton=newton_is_tried)
            grams = InMemory()
            with collecting([block]) as sums, gram_sums([block], gram_request) as block_grams:
                refit.run(step)
            statistics = sums[0].report(*ids.shape)
            grams.keep(block.index, reported(block.index, block_grams[0]))
            few_tokens |= few_token_notes([block], grams, gram_request).get("few_token_experts", {})
            refit.correct(grams)
            terms = None if context.gradients is None else context.gradients.blocks[block.index]
            neurons, groups = score_block(block, statistics, context.importance, pruner.structure, terms, grams)
            decision = best(block, neurons, groups, widths)
            if context.importance.improves_kept:
                decision = improve_kept_units(context, block, decision, statistics, grams)
            replaced = closed_form.compensate(block, decision, statistics, grams)
            if decision != BlockPlan():
                start = replaced
                if refit.holds_out:  # held-out tokens judge the steps, so that the start must not have seen them
                    start = closed_form.compensate(block, decision, statistics, grams, reuse=True, fitted_alone=True)
                slice_block(block, decision, start)
                refitted = refit.solve(newton)
                if refitted:
                    replaced = start | refitted
                elif start is not replaced:
                    slice_block(block, BlockPlan(), replaced)
                step.run()
            pruned.decisions.append(decision)
            pruned.tensors |= replaced
    pruned.notes |= newton.notes() | ({"chosen_ridge": ridges} if (ridges := closed_form.chosen_ridges) else {})
    pruned.notes |= {"few_token_experts": few_tokens} if few_tokens else {}
    return pruned


def _warn_of_few_tokens(context: PlanContext) -> None:
    """Say before the work starts that whole FFNs are refitted to few tokens."""
    assert context.gram_request is not None
    widths, tokens = context.driver.view.widths, context.calibration.input_ids.numel()
    each = tokens * context.gram_request.share * (1 - 1 / HELD_OUT) / max(widths)
    if each < _TOKENS_PER_NEURON:
        log.warning(
            "pruner.compensation=gauss_newton: %d calibration tokens give %.0f to fit for each of %d neurons; below %d "
            "most refits raise the error on held-out tokens and are dropped; use more calibration.n_samples, or "
            "pruner.compensation=least_squares with pruner.ridge=auto",
            tokens, each, max(widths), _TOKENS_PER_NEURON,
        )  # fmt: skip


class _NewtonReport:
    """Held-out errors of the Gauss-Newton refits, and the blocks that were refitted by least squares alone."""

    def __init__(self) -> None:
        self._errors: dict[str, list[float]] = {}
        self._plain: list[int] = []
        self._refused_in_a_row = 0
        self._gave_up_after: int | None = None

    @property
    def gave_up(self) -> bool:
        """Tell whether so many refits in a row were refused that none is tried any more."""
        return self._gave_up_after is not None

    def add(self, block: int, errors: Sequence[float]) -> None:
        """Note the errors of one block; without a finite one, its FFN keeps its least-squares refit."""
        if finite := [error for error in errors if math.isfinite(error)]:
            self._errors[str(block)] = finite
            if len(finite) > 1:  # a step was taken, and the tokens that were held out judged it
                self._refused_in_a_row = 0 if min(finite) < finite[0] else self._refused_in_a_row + 1
            if self._refused_in_a_row == _MOST_REFUSED:
                self._gave_up_after = block
                log.warning(
                    "pruner.compensation=gauss_newton: the refits of %d blocks in a row raised the error on held-out "
                    "tokens, so that blocks after %d are refitted by least squares alone; use more calibration tokens",
                    _MOST_REFUSED, block,
                )  # fmt: skip
        else:
            self._plain.append(block)

    def notes(self) -> dict[str, Any]:
        """Return the facts for the plan; blocks refitted by least squares alone are also logged."""
        notes: dict[str, Any] = {}
        if self._errors:
            notes["gauss_newton"] = self._errors
        if self._gave_up_after is not None:
            notes["gauss_newton_ended_after"] = self._gave_up_after
        if self._plain:
            notes["least_squares_alone"] = self._plain
            log.warning(
                "pruner.compensation=gauss_newton: the FFNs of %d blocks were refitted by least squares alone: they "
                "are no act(gate) * up or act(up) of their inputs, or the calibration is of fewer than four tokens",
                len(self._plain),
            )
        return notes


class _NoRefit:
    """The refit of a block whose FFN is not refitted: it collects nothing and changes nothing.

    Attributes:
        holds_out: whether some tokens are kept from its closed-form start, to judge the steps that follow.
    """

    holds_out = False

    def run(self, step: BlockStep) -> None:
        """Run the whole block on all batches, and collect the data that its FFN is refitted to."""
        step.run()

    def correct(self, grams: InMemory) -> None:
        """Refit the whole output projection to correct its share of the missing output."""

    def solve(self, report: _NewtonReport) -> dict[str, Tensor]:
        """Refit the sliced FFN by Gauss-Newton, where the compensation is gauss_newton.

        Returns:
            Tensor name -> replaced weight.
        """
        return {}


class _FFNRefit(_NoRefit):
    """The refits of one FFN that loses neurons, from batches collected while its whole block runs."""

    def __init__(
        self,
        pruner: OneShotPruner,
        context: PlanContext,
        step: BlockStep,
        ffn: FFN,
        dense: HiddenStates | None,
        *,
        newton: bool,
    ) -> None:
        self._ffn, self._pruner, self._block = ffn, pruner, step.block
        assert context.gram_request is not None
        stride, hold_out = context.gram_request.stride, context.gram_request.hold_out
        self._newton = newton
        self.holds_out = newton and hold_out != "nothing"
        self._dense = dense if dense is not None and _adds_as_it_is(step, ffn) else None
        self._missing = None if self._dense is None else CrossSums(step.block.channels["ffn"], stride, hold_out)
        self._pairs: FFNPairs | None = None
        if newton:
            self._pairs = FFNPairs(len(context.calibration.input_ids), stride, context.driver.hidden_states)
        self._model = context.driver.view.model
        self._activation: Activation | None = None

    def run(self, step: BlockStep) -> None:
        with capturing_ffn(self._block, self._ffn) as captured:
            step.run(partial(self._collect, captured))

    def _collect(self, captured: FFNCapture, batch: int, output: Tensor) -> None:
        """Collect one batch that the FFN has just seen; ``output``: hidden states leaving the block [B, T, d]."""
        missing = None
        if self._dense is not None and self._missing is not None:
            missing = self._dense[batch] - output
            self._missing.add(captured.hidden, missing)
            missing = self._pruner.correction * missing
        if self._pairs is None:
            return
        if self._activation is None:
            self._activation = _activation(self._model, self._ffn, captured)
        if self._activation is None:
            self._pairs = None
        else:
            self._pairs.add(self._ffn, captured, missing)

    def correct(self, grams: InMemory) -> None:
        if self._missing is None:
            return
        channels, gram = self._block.channels["ffn"], grams.read(self._block.index, "ffn")
        weight, cross = channels.output.weight.detach(), self._missing.report()
        ridge: float | None
        if self._pruner.ridge == "auto":
            ridge = chosen_correction_ridge(gram, self._missing.report_parts())
        else:
            ridge = self._pruner.ridge
        if ridge is None:
            return
        if self.holds_out:
            gram, cross = gram.fitted(), self._missing.report_parts()[0]
        set_output_weight(channels, corrected(weight, gram.matrix, cross, self._pruner.correction, ridge))

    def solve(self, report: _NewtonReport) -> dict[str, Tensor]:
        if not self._newton:
            return {}
        weights, errors = self._solve()
        if weights is not None:
            slice_block(self._block, BlockPlan(), weights)
        report.add(self._block.index, errors)
        return weights or {}

    def _solve(self) -> tuple[dict[str, Tensor] | None, list[float]]:
        """Refit the sliced FFN.

        Returns:
            Replaced weights and the errors on the pairs that were held out; None and no errors where the FFN is of a
            form that cannot be refitted.
        """
        if self._pairs is None or self._activation is None:
            return None, []
        sliced = ffn_of(self._ffn.module)
        assert sliced is not None
        return refit_ffn(
            self._block.index,
            sliced,
            self._pairs,
            self._activation,
            steps=self._pruner.newton_steps,
            cg_iterations=self._pruner.cg_iterations,
            damping=_DAMPING if self._pruner.ridge == "auto" else self._pruner.ridge,
        )


def _activation(model: Any, ffn: FFN, captured: FFNCapture) -> Activation | None:
    """Identify the activation function from the first tokens of a batch."""
    x, hidden = (values.flatten(0, 1)[:64] for values in (captured.entering, captured.hidden))
    return activation_of(model, ffn, x, hidden)


def _adds_as_it_is(step: BlockStep, ffn: FFN) -> bool:
    """Return whether a block adds the output of its FFN unchanged, without a norm or a factor in between."""
    before = step.run_first_batch()
    # The shift alternates in sign, so that a norm cannot subtract it as a mean. Its size is that of the output.
    signs = 1 - 2 * (torch.arange(before.shape[-1], device=before.device) % 2)
    shift = (before.abs().float().median() * signs).to(before.dtype)
    handle = ffn.output.module.register_forward_hook(lambda _, args, output: output + shift)
    try:
        moved = step.run_first_batch().float() - before.float()
    finally:
        handle.remove()
    # Half of the values decide: a low precision rounds the largest hidden states by more than the shift.
    return float((moved - shift.float()).abs().median()) <= _ROUNDING * float(shift.float().abs().max())
