"""What a neuron metric is, and the scores it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cfsp.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.calibrate.statistics import Statistics
    from cfsp.models.views import BlockView, DecoderView


class NeuronImportance(Protocol):
    """A metric: one class, one file, one YAML. Higher scores are kept."""

    def score(self, block: BlockView, activation: Tensor) -> Tensor:
        """Scores [N] of a block's neurons.

        Args:
            block: its weights, in fp32, through ``block.ffn.weights()``: gate [N, d], up [N, d], down [d, N].
            activation: X [N], root mean square of each neuron's activation (the input of down_proj), fp32, on the
                weights' device.
        """
        ...


@dataclass(frozen=True)
class Scores:
    """``neurons``: [N_l] fp64 on CPU per block; ``distances``: metric -> [L] fp64 block distances."""

    neurons: tuple[Tensor, ...]
    distances: dict[str, Tensor]


def score(view: DecoderView, statistics: Statistics, importance: NeuronImportance) -> Scores:
    """The scoring stage: statistics and weights -> Scores.

    Raises:
        RunError: a score is not finite; names the block.
    """
    neurons = []
    for block, found in zip(view.blocks, statistics.blocks, strict=True):
        weight = block.ffn.down.weight
        values = importance.score(block, found.ffn.rms.to(weight.device).float()).double().cpu()
        if not values.isfinite().all():
            raise RunError(
                f"block {block.index}: {int((~values.isfinite()).sum())} of {len(values)} scores of "
                f"{type(importance).__name__} are not finite; try model.dtype=float32"
            )
        neurons.append(values)
    distances = {metric: statistics.distance(metric) for metric in statistics.blocks[0].distances}
    return Scores(tuple(neurons), distances)


def shares(values: Tensor, totals: Tensor) -> Tensor:
    """``values / totals`` where 0/0 counts as 0 (dead columns)."""
    return (values / totals).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
