"""Slicing of mixtures: neurons of experts, and whole experts, are removed from the tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cfsp.architecture.experts import ExpertMatrices, ExpertsFFN, update_counts
from cfsp.architecture.views import Channels
from cfsp.plan.slicing import set_output_bias, set_output_weight, slice_ffn


def slice_mixture(
    mixture: ExpertsFFN, experts: Sequence[int] | None = None, neurons: Sequence[Sequence[int]] | None = None
) -> None:
    """Keep only some experts of a mixture, and some neurons of each, in place.

    The router loses the rows of the removed experts, so that it sends their tokens to the others.

    Args:
        mixture: the FFN of a block.
        experts: indices of the experts that stay; None: all.
        neurons: for each expert that stays, in order, the indices of its neurons that stay; None: all.
    """
    if experts is not None:
        _keep_experts(mixture, experts)
    if neurons is None:
        return
    if mixture.each:
        staying = range(mixture.n_experts) if experts is None else experts
        for expert, kept in zip(staying, neurons, strict=True):
            ffn = mixture.each[expert]
            slice_ffn(ffn, torch.tensor(kept, device=ffn.output.parameter.device))
        return
    width, columns = mixture.width, torch.tensor(neurons, device=mixture.device)  # [E, K]
    down = mixture.fused["down"]
    inputs = [matrices for kind, matrices in mixture.fused.items() if kind != "down"]
    # The rows of gate and up in their parameter, in the order that they have there.
    rows = torch.cat([_stored_rows(matrices, width)[columns] for matrices in inputs], dim=1).sort(dim=1).values
    _keep_indices(inputs[0], inputs[0].out_axis, rows)
    _keep_indices(down, 3 - down.out_axis, columns)
    _replace(inputs[0].owner, f"{inputs[0].name}_bias", lambda bias: bias.gather(1, rows))
    update_counts(mixture.experts, width, columns.shape[1], width=True)


def set_expert_outputs(
    mixture: ExpertsFFN, staying: Sequence[int], weights: Tensor | None, biases: Tensor | None
) -> None:
    """Give the down matrices of a mixture, sliced already, refitted weights and biases, in place.

    Args:
        mixture: the FFN of a block, as it was recognised before it was sliced.
        staying: indices of the experts that stay.
        weights: [E, d, K]; None: they stay.
        biases: [E, d]; None: they stay.
    """
    if mixture.each:
        for place, expert in enumerate(staying):
            channels = Channels(-1, "ffn", mixture.each[expert], expert)
            if weights is not None:
                set_output_weight(channels, weights[place])
            if biases is not None:
                set_output_bias(channels, biases[place])
        return
    down = mixture.fused["down"]
    # Copies, so that training does not write into the plan's tensors.
    if weights is not None:
        fitted = weights.transpose(1, 2) if down.transposed else weights
        _replace(down.owner, down.name, lambda old: fitted.to(old.device, old.dtype, copy=True).contiguous())
    if biases is not None:
        _replace(down.owner, f"{down.name}_bias", lambda old: biases.to(old.device, old.dtype, copy=True))


def _stored_rows(matrices: ExpertMatrices, width: int) -> Tensor:
    """Return the rows of the stored parameter that hold the rows 0..N-1 of the matrix."""
    total = matrices.parameter.shape[matrices.out_axis]
    device = matrices.parameter.device
    return torch.arange(total, device=device)[matrices.rows or slice(None)][:width]


def _keep_indices(matrices: ExpertMatrices, axis: int, kept: Tensor) -> None:
    """Keep the rows or columns ``kept`` [E, K] of each expert's stored matrix."""

    def select(stored: Tensor) -> Tensor:
        return torch.stack([matrix.index_select(axis - 1, own) for matrix, own in zip(stored, kept, strict=True)])

    _replace(matrices.owner, matrices.name, select)


def _keep_experts(mixture: ExpertsFFN, experts: Sequence[int]) -> None:
    kept = torch.tensor(experts)  # on the CPU: from the meta device of a streamed model it could not be moved
    rows = [*mixture.per_expert(), *(mixture.stored() if mixture.fused else ())]
    for module, name in rows:
        _replace(module, name, lambda tensor: tensor.index_select(0, kept.to(tensor.device)))
    if isinstance(mixture.experts, nn.ModuleList):
        for index in sorted(set(range(mixture.n_experts)) - set(experts), reverse=True):
            del mixture.experts[index]
    for module in {mixture.module, mixture.experts, *mixture.router.modules()}:
        update_counts(module, mixture.n_experts, len(kept))


def _replace(module: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Replace a parameter or buffer by a changed copy, if the module has one."""
    parameter, buffer = module._parameters.get(name), module._buffers.get(name)
    if parameter is not None:
        setattr(module, name, nn.Parameter(change(parameter.detach()), requires_grad=parameter.requires_grad))
    elif buffer is not None:
        module._buffers[name] = change(buffer)
