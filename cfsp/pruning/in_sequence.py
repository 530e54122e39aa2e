"""Block after block: each is chosen, and compensated, on what the pruned blocks before it give."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from cfsp.calibrate.collectors import collecting
from cfsp.calibrate.ffn_pairs import FFNPairs, seeing_ffn
from cfsp.calibrate.gram import CrossSums, InMemory, gram_sums, reported
from cfsp.importance.base import score_block
from cfsp.models.activation import activation_of
from cfsp.models.ffn import FFN, ffn_of
from cfsp.models.snapshot import restored
from cfsp.pruning.apply import slice_block
from cfsp.pruning.ffn_refit import refit_ffn
from cfsp.pruning.least_squares import corrected
from cfsp.pruning.plan import BlockPlan
from cfsp.pruning.slicing import set_output_weight

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.allocate.budget import Widths
    from cfsp.calibrate.ffn_pairs import SeenInFFN
    from cfsp.models.activation import Activation
    from cfsp.models.driver import BlockStep
    from cfsp.models.hidden_states import HiddenStates
    from cfsp.pruning.base import PlanContext
    from cfsp.pruning.one_shot import OneShotPruner

log = logging.getLogger(__name__)

#: What half of a block's outputs may move by beside the shift of its FFN's output, relative to it.
_ROUNDING = 0.02


@dataclass
class InSequence:
    """``decisions``, the ``tensors`` that they replace, and ``notes`` of how the refits went."""

    decisions: list[BlockPlan] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def prune_in_sequence(pruner: OneShotPruner, context: PlanContext, widths: Widths) -> InSequence:
    """Decide block after block; the model is put back at the end.

    Where FFNs make up for a share of what the pruned blocks before them have changed (``pruner.correction``), the dense
    model's hidden states go along beside those of the pruned one.
    """
    from cfsp.pruning.one_shot import best

    driver, ids, wanted = context.driver, context.calibration.input_ids, context.gram_wanted
    made, errors, plain = InSequence(), dict[str, list[float]](), list[int]()
    correcting = pruner.refits and pruner.correction > 0 and pruner.structure != "heads"
    dense = driver.hidden_states() if correcting else None
    with restored(driver.view.model):
        for step in driver.steps(ids, "prune in sequence"):
            block = step.block
            refit: _FFNRefit | None = None  # the last block's pairs go before the dense model runs
            if dense is not None:
                if not len(dense):
                    for state in step.inputs:
                        dense.append(state.clone())
                step.beside(dense)
            if pruner.refits and isinstance(block.ffn, FFN) and widths.per_block[block.index] < block.ffn.width:
                refit = _FFNRefit(pruner, context, step, block.ffn, dense)
            grams = InMemory()
            seeing = nullcontext() if refit is None else seeing_ffn(block, refit.ffn)
            with collecting([block]) as sums, gram_sums([block], wanted) as of_grams, seeing as seen:
                step.run(None if refit is None or seen is None else refit.collector(seen))
            found = sums[0].report(*ids.shape)
            grams.keep(block.index, reported(block.index, of_grams[0]))
            if refit is not None:
                refit.correct(grams)
            terms = None if context.gradients is None else context.gradients.blocks[block.index]
            neurons, groups = score_block(block, found, context.importance, pruner.structure, terms, grams)
            decision = best(block, neurons, groups, widths)
            replaced = pruner.compensate(block, decision, found, grams)
            if decision != BlockPlan():
                slice_block(block, decision, replaced)
                if refit is not None and pruner.compensation == "gauss_newton":
                    found_by_newton = refit.gauss_newton()
                    of_block: list[float] = []
                    if found_by_newton is not None:
                        refitted, of_block = found_by_newton
                        slice_block(block, BlockPlan(), refitted)
                        replaced |= refitted
                    if finite := [error for error in of_block if math.isfinite(error)]:
                        errors[str(block.index)] = finite
                    else:
                        plain.append(block.index)
                step.run()
            made.decisions.append(decision)
            made.tensors |= replaced
    if errors:
        made.notes["gauss_newton"] = errors
    if plain:
        made.notes["least_squares_alone"] = plain
        log.warning(
            "pruner.compensation=gauss_newton: the FFNs of %d blocks were refitted by least squares alone: they are no "
            "act(gate) * up or act(up) of their inputs, or the calibration is of fewer than four tokens", len(plain),
        )  # fmt: skip
    return made


class _FFNRefit:
    """One FFN that loses neurons: what its refits go by is collected while the block runs, whole, on all batches."""

    def __init__(
        self, pruner: OneShotPruner, context: PlanContext, step: BlockStep, ffn: FFN, dense: HiddenStates | None
    ) -> None:
        self.ffn, self._pruner, self._block = ffn, pruner, step.block
        assert context.gram_wanted is not None
        stride = context.gram_wanted.stride
        self._dense = dense if dense is not None and _adds_as_it_is(step, ffn) else None
        self._missing = None if self._dense is None else CrossSums(step.block.channels["ffn"], stride)
        self._pairs: FFNPairs | None = None
        if pruner.compensation == "gauss_newton":
            self._pairs = FFNPairs(len(context.calibration.input_ids), stride, context.driver.hidden_states)
        self._model = context.driver.view.model
        self._activation: Activation | None = None

    def collector(self, seen: SeenInFFN) -> Callable[[int, Tensor], None]:
        """To be called with each batch and what left the block."""

        def collect(batch: int, output: Tensor) -> None:
            missing = None
            if self._dense is not None and self._missing is not None:
                missing = self._dense[batch] - output
                self._missing.add(seen.hidden, missing)
                missing = self._pruner.correction * missing
            if self._pairs is None:
                return
            if self._activation is None:
                self._activation = _activation(self._model, self.ffn, seen)
            if self._activation is None:
                self._pairs = None
            else:
                self._pairs.add(self.ffn, seen, missing)

        return collect

    def correct(self, grams: InMemory) -> None:
        """Refit the whole output projection to make up for its share of what is missing."""
        if self._missing is None:
            return
        channels, gram = self._block.channels["ffn"], grams.read(self._block.index, "ffn").matrix
        weight = channels.output.weight.detach()
        shifted = corrected(weight, gram, self._missing.report(), self._pruner.correction, self._pruner.ridge)
        set_output_weight(channels, shifted)

    def gauss_newton(self) -> tuple[dict[str, Tensor], list[float]] | None:
        """Of the sliced FFN: replaced weights, and errors on what was held out; None where it is of another form."""
        if self._pairs is None or self._activation is None:
            return None
        sliced = ffn_of(self.ffn.module)
        assert sliced is not None
        return refit_ffn(
            self._block.index,
            sliced,
            self._pairs,
            self._activation,
            steps=self._pruner.newton_steps,
            cg_iterations=self._pruner.cg_iterations,
            damping=self._pruner.ridge,
        )


def _activation(model: Any, ffn: FFN, seen: SeenInFFN) -> Activation | None:
    """By the first tokens of a batch."""
    x, hidden = (values.flatten(0, 1)[:64] for values in (seen.entering, seen.hidden))
    return activation_of(model, ffn, x, hidden)


def _adds_as_it_is(step: BlockStep, ffn: FFN) -> bool:
    """Whether a block adds what leaves its FFN to its output as it is: no norm and no factor comes in between."""
    before = step.first()
    # A shift that alternates, so that a norm's mean does not take it away; of the size of what is there.
    signs = 1 - 2 * (torch.arange(before.shape[-1], device=before.device) % 2)
    shift = (before.abs().float().median() * signs).to(before.dtype)
    handle = ffn.output.module.register_forward_hook(lambda _, args, output: output + shift)
    try:
        moved = step.first().float() - before.float()
    finally:
        handle.remove()
    # Half of the values decide: a low precision rounds the largest hidden states by more than the shift.
    return float((moved - shift.float()).abs().median()) <= _ROUNDING * float(shift.float().abs().max())
