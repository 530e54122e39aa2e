"""The apply stage: model, PruningPlan -> smaller model, by real slicing, in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from cfsp.errors import CheckpointError, UnsupportedModelError
from cfsp.models.remote_code import adopt, check_adoptable
from cfsp.models.sample import weight_sample
from cfsp.models.views import DecoderView, resolve
from cfsp.pruning.plan import PruningPlan
from cfsp.pruning.slicing import linears_of, slice_ffn, swap_linears

Model = TypeVar("Model", bound=nn.Module)


def apply(model: Model, plan: PruningPlan) -> Model:
    """Slice ``model`` (the plan's base model) in place and return it; its configuration and class follow.

    Raises:
        CheckpointError: the plan does not fit: another base model, number of blocks or widths.
        UnsupportedModelError: the plan removes what cannot be sliced here.
    """
    check_adoptable(model)  # type: ignore[arg-type]
    view = resolve(model)
    check_fits(view, plan)
    for block, decision in zip(view.blocks, plan.blocks, strict=True):
        if decision.ffn_kept is not None:
            slice_ffn(block.ffn, torch.tensor(decision.ffn_kept, device=block.ffn.down.weight.device))
    adopt(view.model, view.widths)
    return model


def check_fits(view: DecoderView, plan: PruningPlan) -> None:
    """Raises where ``plan`` was not made for the model of ``view``."""
    if len(plan.blocks) != len(view.blocks):
        raise CheckpointError(f"the plan has {len(plan.blocks)} blocks, the model {len(view.blocks)}")
    for block, decision in zip(view.blocks, plan.blocks, strict=True):
        if decision.kv_groups_kept is not None or not decision.attention or not decision.ffn:
            raise UnsupportedModelError(
                f"block {block.index}: the plan removes attention or a whole FFN; this version slices FFN neurons only"
            )
        if decision.ffn_kept is not None and decision.ffn_kept[-1] >= block.ffn.width:
            raise CheckpointError(
                f"block {block.index}: the plan keeps neuron {decision.ffn_kept[-1]}, the model has {block.ffn.width}"
            )
    if plan.base_sample and plan.base_sample != weight_sample(view):
        raise CheckpointError(
            f"the plan was made for {plan.base_model} ({plan.base_fingerprint[:19]}...), whose weights are not "
            "those of this model; load the plan's base model"
        )


@contextmanager
def dense_again(view: DecoderView, originals: list[tuple[nn.Linear, nn.Linear, nn.Linear]]) -> Iterator[None]:
    """Put the dense FFN linears back for a while (a side-by-side timing); everything else is shared."""
    pruned = [linears_of(block.ffn) for block in view.blocks]
    for block, linears in zip(view.blocks, originals, strict=True):
        swap_linears(block.ffn, linears)
    try:
        yield
    finally:
        for block, linears in zip(view.blocks, pruned, strict=True):
            swap_linears(block.ffn, linears)
