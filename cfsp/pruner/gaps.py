"""Gaps that removed blocks and submodules leave in a model, and the dense hidden states around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from cfsp.model.block_calls import input_hidden, output_hidden
from cfsp.model.driver import BlockDriver
from cfsp.plan.pruning_plan import BlockPlan

if TYPE_CHECKING:
    from cfsp.architecture.views import DecoderView

#: A submodule: index of its block, and attention or ffn.
Place = tuple[int, str]
#: A point of the residual stream: index of a block, and where in it.
Point = tuple[int, Literal["entering", "middle", "leaving"]]


@dataclass(frozen=True)
class Gap:
    """Removed submodules without a kept one in between.

    Attributes:
        writer: last kept submodule before the gap; None where the gap begins the model.
        removed: the submodules, in the order in which they write.
        before: point of the residual stream before the gap (Y).
        behind: point behind it (L).
    """

    writer: Place | None
    removed: tuple[Place, ...]
    before: Point
    behind: Point


def find_gaps(view: DecoderView, blocks: Sequence[BlockPlan]) -> list[Gap]:
    """Return the gaps that a plan leaves in a model, in order."""
    all_gaps: list[Gap] = []
    writer: Place | None = None
    removed: list[Place] = []
    for place in [*iterate_submodules(view), None]:
        if place is not None and not is_kept(place, blocks):
            removed.append(place)
            continue
        if removed:
            all_gaps.append(Gap(writer, tuple(removed), _before(view, removed[0]), _behind(view, removed[-1])))
            removed = []
        writer = place
    return all_gaps


def iterate_submodules(view: DecoderView) -> Iterator[Place]:
    """Yield the submodules of a model in the order in which they write to the residual stream."""
    for block in view.blocks:
        if not block.attention_removed:
            yield block.index, "attention"
        if block.ffn is not None:
            yield block.index, "ffn"


def is_kept(place: Place, blocks: Sequence[BlockPlan]) -> bool:
    """Return whether a plan keeps a submodule."""
    decision = blocks[place[0]]
    return decision.attention if place[1] == "attention" else decision.ffn


def _before(view: DecoderView, place: Place) -> Point:
    has_attention = not view.blocks[place[0]].attention_removed
    return place[0], "middle" if place[1] == "ffn" and has_attention else "entering"


def _behind(view: DecoderView, place: Place) -> Point:
    return place[0], "middle" if place[1] == "attention" and view.blocks[place[0]].ffn is not None else "leaving"


@dataclass
class Batch:
    """Tensors of one batch of the dense model, as hooks give them.

    Attributes:
        shape: sequences and tokens.
        entering: block -> hidden state entering it.
        leaving: block -> hidden state leaving it.
        outputs: submodule -> output of its projection.
    """

    shape: tuple[int, int] = (0, 0)
    entering: dict[int, Tensor] = field(default_factory=dict)
    leaving: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[Place, Tensor] = field(default_factory=dict)

    def state(self, point: Point) -> Tensor:
        """Return the residual stream at a point, [tokens, d] float64, on the device of the last block."""
        block, where = point
        state = _rows((self.entering if where == "entering" else self.leaving)[block])
        if where == "middle":  # the FFN adds its output as it is, which check_residual_stream has made sure of
            state = state - self.written((block, "ffn"))
        return state

    def written(self, place: Place) -> Tensor:
        """Return what a submodule adds to the residual stream, [tokens, d] float64."""
        return _rows(self.outputs[place])


def _rows(values: Tensor) -> Tensor:
    return values.detach().double().reshape(-1, values.shape[-1])


def collect_states(
    driver: BlockDriver, input_ids: Tensor, all_gaps: Sequence[Gap], each: Callable[[Batch], None]
) -> None:
    """Run the dense model over the calibration set once; a streamed model is read once for each batch.

    Args:
        driver: runs the model.
        input_ids: [n, T].
        all_gaps: the gaps, whose points and writers are kept for a batch.
        each: called with the tensors of a batch.
    """
    view = driver.view
    points = {point for gap in all_gaps for point in (gap.before, gap.behind)}
    written = {gap.writer for gap in all_gaps if gap.writer is not None}
    written |= {(block, "ffn") for block, where in points if where == "middle"}
    batch = Batch()
    last = view.blocks[-1].index

    def enter(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            batch.entering[index] = input_hidden(args, kwargs).to(view.device)

        return hook

    def leave(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            state = output_hidden(output)
            batch.shape = (state.shape[0], state.shape[1])
            if any(block == index for block, _ in points):
                batch.leaving[index] = state.to(view.device)
            if index == last:
                each(batch)
                for kept in (batch.entering, batch.leaving, batch.outputs):
                    kept.clear()

        return hook

    def write(place: Place) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            batch.outputs[place] = output.to(view.device)

        return hook

    handles = []
    try:
        for index in sorted({block for block, where in points if where == "entering"}):
            handles.append(view.blocks[index].module.register_forward_pre_hook(enter(index), with_kwargs=True))
        for place in sorted(written):
            handles.append(view.blocks[place[0]].channels[place[1]].output.module.register_forward_hook(write(place)))
        for index in sorted({last, *(block for block, where in points if where != "entering")}):
            handles.append(view.blocks[index].module.register_forward_hook(leave(index)))
        driver.run(input_ids, "hidden states around removed blocks")
    finally:
        for handle in handles:
            handle.remove()
