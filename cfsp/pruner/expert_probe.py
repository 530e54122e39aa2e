"""The numeric check of a mixture: its parts sum to its output, and zeroing a unit equals slicing it away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cfsp.architecture.experts import ExpertsFFN
from cfsp.architecture.views import BlockView, DecoderView, view_block
from cfsp.calibration.routing import Routing, routing_of_modules, substituted
from cfsp.errors import UnsupportedModelError
from cfsp.model.block_calls import output_hidden, replace_forward
from cfsp.model.snapshot import clone_module
from cfsp.plan.expert_slicing import slice_mixture

#: Tokens for each expert, so that nearly all of them see some.
_TOKENS = 16


@torch.no_grad()
def deviation(view: DecoderView, block: BlockView, *, whole: bool) -> float:
    """Measure the largest difference between slicing and masking a mixture, relative to its largest output.

    Copies run in the order of the class's own loop (a width that the grouped product cannot run must not matter). They
    compare the sum of the recomputed experts with the mixture's output, and the mixture with one neuron less in each
    expert with one where these neurons are zero.

    Args:
        whole: also compare the mixture with one expert of each group less with one where the router's logits of these
            experts are -inf.

    Raises:
        Exception: whatever the mixture itself raises where it cannot run on the probe.
    """
    assert block.experts is not None
    with view.weights.resident(block):
        mixture = _clone_mixture(view, block)
        generator = torch.Generator().manual_seed(0)
        example = mixture.expert(0).output.weight
        states = torch.randn(1, _TOKENS * mixture.n_experts, mixture.hidden, generator=generator)
        states = states.to(example.device, example.dtype)
        output = output_hidden(mixture.module(states))
        scale = output.abs().max().clamp_min(1e-30)
        worst = (_summed_experts(mixture, states) - output).abs().max() / scale
        for first in (True, False):
            cut = _clone_mixture(view, block)
            # A different neuron in each expert, so that confused experts are detected.
            removed_neurons = [
                0 if (expert % 2 == 0) == first else mixture.width - 1 for expert in range(mixture.n_experts)
            ]
            for expert, neuron in enumerate(removed_neurons):
                mixture.expert(expert).output.weight[:, neuron] = 0
            slice_mixture(cut, None, [[n for n in range(mixture.width) if n != neuron] for neuron in removed_neurons])
            zeroed = output_hidden(mixture.module(states))
            worst = max(worst, (output_hidden(cut.module(states)) - zeroed).abs().max() / scale)
            mixture = _clone_mixture(view, block)
        if whole and mixture.n_experts > mixture.least_experts:
            per_group = mixture.n_experts // mixture.groups
            for at in (0, per_group - 1):
                lost = {group * per_group + at for group in range(mixture.groups)}
                cut = _clone_mixture(view, block)
                slice_mixture(cut, [expert for expert in range(mixture.n_experts) if expert not in lost])
                masked = masked_output(_clone_mixture(view, block), sorted(lost), states)
                worst = max(worst, (output_hidden(cut.module(states)) - masked).abs().max() / scale)
    return float(worst)


def masked_output(mixture: ExpertsFFN, removed_experts: list[int], states: Tensor) -> Tensor:
    """Run a mixture with the router's logits of ``removed_experts`` set to -inf; this changes the mixture."""
    for module, name in mixture.per_expert():
        buffer = module._buffers.get(name)
        if buffer is not None and buffer.is_floating_point():  # added to scores that -inf leaves at 0 (DeepSeek-V3)
            buffer[removed_experts] = -torch.inf
    with _Masked((mixture.n_experts, mixture.hidden), removed_experts):
        return output_hidden(mixture.module(states))


class _Masked(TorchFunctionMode):
    """Set the logits of the removed experts to -inf in every linear of the router's shape."""

    def __init__(self, shape: tuple[int, int], removed_experts: list[int]) -> None:
        super().__init__()
        self._shape, self._gone = shape, removed_experts

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and tuple(args[1].shape) == self._shape:
            result[..., self._gone] = -torch.inf
        return result


def _summed_experts(mixture: ExpertsFFN, states: Tensor) -> Tensor:
    """Recompute the mixture's output from its experts one by one, their routing weights, and the shared experts."""
    total = substituted(mixture, states, [None] * mixture.n_experts).clone()
    routing = _routing(mixture, states)
    flat = total.view(-1, total.shape[-1])
    for expert in range(mixture.n_experts):
        token, weight = routing.of(expert)
        if len(token):
            added = mixture.run(expert, routing.states[token])[1] * weight[:, None]
            flat.index_add_(0, token, added.to(flat.dtype))
    return total


def _routing(mixture: ExpertsFFN, states: Tensor) -> Routing:
    if mixture.each:
        return routing_of_modules(mixture, states)
    routings: list[Routing] = []

    def record_routing(states: Tensor, chosen: Tensor, weights: Tensor, *_: Any) -> Tensor:
        routings.append(Routing(states.flatten(0, -2), chosen.flatten(0, -2), weights.flatten(0, -2)))
        return torch.zeros_like(states)

    with replace_forward(mixture.experts, record_routing):
        mixture.module(states)
    return routings[0]


def _clone_mixture(view: DecoderView, block: BlockView) -> ExpertsFFN:
    """Copy the mixture with its own weights, which may be zeroed."""
    module = clone_module(block.module, own_values=True)
    for child in module.modules():
        config: Any = getattr(child, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
    mixture = view_block(view.model, f"block {block.index}", block.index, module).experts
    assert mixture is not None
    return mixture


def check_mixture(view: DecoderView, block: BlockView, tolerance: float, *, whole: bool) -> None:
    """Refuse a mixture where slicing and masking differ, so that its structure is not understood.

    Raises:
        UnsupportedModelError: names the block and the deviation.
    """
    assert block.experts is not None
    name = (
        f"{type(view.model).__name__}: block {block.index} looks like a mixture of {block.experts.n_experts} experts "
        f"({type(block.experts.module).__name__}), but"
    )
    try:
        measured = deviation(view, block, whole=whole)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, AssertionError) as error:
        raise UnsupportedModelError(
            f"{name} it does not run with a neuron{' or an expert' if whole else ''} less "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'})"
        ) from error
    if not measured <= tolerance:
        raise UnsupportedModelError(
            f"{name} what its experts add up to, or removing a unit against zeroing it, differs by {measured:.1e} of "
            "the output; its structure is not understood"
        )
