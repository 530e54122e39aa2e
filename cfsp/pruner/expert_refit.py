"""Least-squares compensation inside the experts of a mixture, each on the tokens that are routed to it.

Every expert is refitted as an FFN of its own (:mod:`cfsp.pruner.least_squares`): the kept columns of its down matrix
give on its tokens what all of them gave. The routing weight multiplies the output of both alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cfsp.calibration.gram import expert_kind
from cfsp.calibration.gram_store import few_token_experts
from cfsp.plan.pruning_plan import BlockPlan, tensor_name
from cfsp.pruner.least_squares import Ridge, chosen_ridge, refit_output

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.views import BlockView
    from cfsp.calibration.gram_store import GramMatrices


def expert_compensation(
    block: BlockView,
    decision: BlockPlan,
    grams: GramMatrices,
    ridge: Ridge,
    chosen: dict[str, Any] | None = None,
    *,
    reuse: bool = False,
) -> dict[str, Tensor]:
    """Return the refitted down matrices of the experts of one block, by their names in the plan.

    An expert that saw too few tokens keeps its columns (and its bias) as they are.

    Args:
        block: the block, dense.
        decision: units of it that stay.
        grams: Gram matrices of the model.
        ridge: strength, or auto.
        chosen: takes note of the ridges that auto has chosen: "experts" -> block -> one for each expert, None for no
            change.
        reuse: take ridges that ``chosen`` notes already, of this decision or of another one on the same block.

    Returns:
        Weights [E, d, kept], and biases [E, d] where the experts have some; empty where no neuron of experts goes.
    """
    mixture, kept_neurons = block.experts, decision.expert_neurons_kept
    if mixture is None or kept_neurons is None:
        return {}
    few = set(few_token_experts(block, grams))
    noted = (chosen or {}).get("experts", {}).get(str(block.index)) if reuse else None
    weights, biases, ridges = [], [], list[float | None]()
    for expert, neurons in enumerate(kept_neurons):
        output = mixture.expert(expert).output
        weight, bias = output.weight.detach(), output.bias
        kept = torch.tensor(neurons, device=weight.device)
        strength: float | None = None
        if expert in few:
            fitted = weight.index_select(1, kept)
        else:
            gram = grams.read(block.index, expert_kind(expert))
            if ridge != "auto":
                strength = ridge
            elif noted is not None:
                strength = noted[expert]
            else:
                strength = chosen_ridge(weight, gram, kept, centred=bias is not None)
            fitted, bias = refit_output(weight, bias, gram, kept, strength)
        ridges.append(strength)
        weights.append(fitted.to(weight.dtype).cpu())
        if bias is not None:
            biases.append(bias.detach().float().cpu())
    if ridge == "auto" and chosen is not None:
        chosen.setdefault("experts", {})[str(block.index)] = ridges
    tensors = {tensor_name(block.index, "experts", "weight"): torch.stack(weights)}
    if biases:
        tensors[tensor_name(block.index, "experts")] = torch.stack(biases)
    return tensors
