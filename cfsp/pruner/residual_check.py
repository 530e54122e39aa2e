"""Numeric check that the blocks of a model carry the compensation of a removed block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cfsp.errors import UnsupportedModelError
from cfsp.model.driver import BlockDriver, run_block

if TYPE_CHECKING:
    from cfsp.architecture.views import BlockView, DecoderView

#: Tolerance of the numeric checks, relative to the median of what is compared; rounding to bfloat16 is below it.
_ROUNDING = 0.02
#: Tolerance for the norms' epsilon.
_EPSILON = 0.1


@torch.no_grad()
def check_residual_stream(view: DecoderView, compensation: str) -> None:
    """Refuse models whose residual stream does not carry the compensation.

    Both compensations need blocks that add the outputs of their projections as they are: constant outputs must come
    out as the input plus these constants. ``scale`` also needs that a factor on the whole stream changes nothing that
    the blocks or the head read from it. One block and the head are run on random states.

    Args:
        view: the model, with weights.
        compensation: linear_map or scale.

    Raises:
        UnsupportedModelError: names what is different in this model.
    """
    block = max(view.blocks, key=lambda block: len(block.channels))
    driver = BlockDriver(view, 1)
    ids = torch.zeros(1, 4, dtype=torch.int64, device=view.device)
    entry = driver.entry(ids)
    like, kwargs = entry.hidden[0], entry.kwargs[block.index][0]
    generator = torch.Generator().manual_seed(0)
    x, *constants = (torch.randn(like.shape, generator=generator).to(like) for _ in range(1 + len(block.channels)))
    wish = f"{type(view.model).__name__}: pruner.compensation={compensation}"
    added = dict(zip(block.channels, constants, strict=True))
    with view.weights.resident(block):
        with _outputs_changed(block, lambda kind, output: added[kind].view_as(output)):
            leaving = run_block(block, x, kwargs)
        if _differs(leaving, x + sum(constants), _ROUNDING):
            raise UnsupportedModelError(
                f"{wish} needs blocks that add the outputs of attention and FFN as they are, and a norm or a factor "
                f"follows them here (block {block.index}); use pruner.compensation=none"
            )
        if compensation == "linear_map":
            return
        first, doubled = _read(block, x, kwargs, 1), _read(block, 2 * x, kwargs, 2)
    is_read = any(_differs(doubled[kind], output, _EPSILON) for kind, output in first.items())
    with view.weights.resident_rest():
        is_read = is_read or _differs(driver.logits(ids, 2 * x), driver.logits(ids, x), _EPSILON)
    if is_read:
        raise UnsupportedModelError(
            f"{wish} needs a norm before everything that reads the hidden state, and a factor on it changes what "
            "follows in this model; use pruner.compensation=linear_map or none"
        )


def _read(block: BlockView, x: Tensor, kwargs: dict[str, Any], factor: float) -> dict[str, Tensor]:
    """Return the outputs of the projections of a block whose contributions to the stream are multiplied."""
    outputs: dict[str, Tensor] = {}

    def change(kind: str, output: Tensor) -> Tensor:
        outputs[kind] = output
        return factor * output

    with _outputs_changed(block, change):
        run_block(block, x, kwargs)
    return outputs


@contextmanager
def _outputs_changed(block: BlockView, change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Replace the outputs of down_proj and o_proj of a block inside."""

    def hook_of(kind: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return change(kind, output)

        return hook

    handles = [channels.output.module.register_forward_hook(hook_of(kind)) for kind, channels in block.channels.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _differs(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Return whether half of the values differ by more than a share of the median size."""
    found, expected = found.float(), expected.float()
    return not float((found - expected).abs().median()) <= tolerance * float(expected.abs().median())
