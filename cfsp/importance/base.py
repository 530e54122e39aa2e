"""What a metric is, and the scores it gives to FFN neurons and to the channels of attention heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cfsp.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.allocate.budget import Structure
    from cfsp.calibrate.gradients import GradientTerms
    from cfsp.calibrate.gram import GramMatrices
    from cfsp.calibrate.statistics import BlockStatistics, InputStatistics, Statistics
    from cfsp.models.views import BlockView, Channels, DecoderView


@dataclass(frozen=True)
class Activation:
    """What the calibration pass saw at the channels, [N] fp32 each, on the weights' device.

    rms: root mean square over all tokens; mean and (population) variance over all tokens; mean_norm: mean over the
    sequences of the L2 norm over a sequence's tokens, divided by sqrt(T). ``gradients``: projection name ->
    gradient terms (:mod:`cfsp.calibrate.gradients`); ``gram``: X^T X per token, [N, N] (:mod:`cfsp.calibrate.gram`);
    both only for a metric whose ``requires`` names them.
    """

    rms: Tensor
    mean: Tensor
    variance: Tensor
    mean_norm: Tensor
    gradients: Mapping[str, Tensor] | None = None
    gram: Tensor | None = None


class NeuronImportance(Protocol):
    """A metric: one class, one file, one YAML. Higher scores are kept.

    A class attribute ``requires``, of "gradients" and "gram", asks for what is not collected anyway.
    """

    def score(self, channels: Channels, activation: Activation) -> Tensor:
        """Scores [N] of the input channels of one output projection: FFN neurons, or channels of attention heads.

        Args:
            channels: their weights, in fp32, through ``channels.weights()``: the matrices that make the channels,
                [N, d] each (ffn: gate, up; attention: q, k, v), and the output's [d, N] (down; o).
            activation: what the calibration pass saw there.
        """
        ...


@dataclass(frozen=True)
class Scores:
    """Per block, fp64 on CPU: ``neurons`` [N]; ``kv_groups`` [groups, channels of a group]; empty where not pruned.

    ``distances``: metric -> [L] block distances.
    """

    neurons: tuple[Tensor, ...]
    kv_groups: tuple[Tensor, ...]
    distances: dict[str, Tensor]

    def only(self, blocks: Sequence[int]) -> Scores:
        """The same with these blocks alone."""
        return Scores(
            tuple(self.neurons[block] for block in blocks),
            tuple(self.kv_groups[block] for block in blocks),
            {metric: values[list(blocks)] for metric, values in self.distances.items()},
        )


def required(importance: NeuronImportance) -> tuple[str, ...]:
    """What the metric needs beside the core set of statistics."""
    return tuple(getattr(importance, "requires", ()))


def score(
    view: DecoderView,
    statistics: Statistics,
    importance: NeuronImportance,
    structure: Structure = "ffn",
    gradients: GradientTerms | None = None,
    scored: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    grams: GramMatrices | None = None,
) -> Scores:
    """The scoring stage: statistics and weights -> Scores; blocks in ``scored`` are taken from there.

    Raises:
        RunError: a score is not finite; names the block.
    """
    from cfsp.models.streamed import resident

    neurons, kv_groups = [], []
    for block, found in zip(view.blocks, statistics.blocks, strict=True):
        terms = None if gradients is None else gradients.blocks[block.index]
        if scored and block.index in scored:
            neurons_of, groups_of = scored[block.index]
        else:
            with resident(view, block):
                neurons_of, groups_of = score_block(block, found, importance, structure, terms, grams)
        neurons.append(neurons_of)
        kv_groups.append(groups_of)
    distances = {metric: statistics.distance(metric) for metric in statistics.blocks[0].distances}
    return Scores(tuple(neurons), tuple(kv_groups), distances)


def score_block(
    block: BlockView,
    found: BlockStatistics,
    importance: NeuronImportance,
    structure: Structure,
    gradients: Mapping[str, Tensor] | None = None,
    grams: GramMatrices | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores of one block: neurons [N] and KV groups [groups, channels of a group]; empty where not asked for."""
    import torch

    neurons, kv_groups = torch.zeros(0, dtype=torch.float64), torch.zeros(0, 1, dtype=torch.float64)
    channels = block.channels
    if structure != "heads" and "ffn" in channels and found.ffn is not None:
        neurons = _scored(channels["ffn"], found.ffn, importance, gradients, grams)
    if structure != "ffn" and block.attention is not None and found.attention is not None:
        values = _scored(channels["attention"], found.attention, importance, gradients, grams)
        kv_groups = values.unflatten(0, (block.attention.n_kv_heads, -1))
    return neurons, kv_groups


def _scored(
    channels: Channels,
    inputs: InputStatistics,
    importance: NeuronImportance,
    gradients: Mapping[str, Tensor] | None,
    grams: GramMatrices | None,
) -> Tensor:
    device = channels.output.weight.device
    rms, mean, variance, mean_norm = (
        value.to(device).float() for value in (inputs.rms, inputs.mean, inputs.variance, inputs.mean_norm)
    )
    wanted = grams is not None and "gram" in required(importance)
    gram = grams.read(channels.block, channels.kind).matrix.to(device) if wanted and grams is not None else None
    activation = Activation(rms, mean, variance, mean_norm, gradients, gram)
    values = importance.score(channels, activation).double().cpu()
    if not values.isfinite().all():
        raise RunError(
            f"block {channels.block}: {int((~values.isfinite()).sum())} of {len(values)} {channels.kind} scores of "
            f"{type(importance).__name__} are not finite; try model.dtype=float32"
        )
    return values


def shares(values: Tensor, totals: Tensor) -> Tensor:
    """``values / totals`` where 0/0 counts as 0 (dead columns)."""
    return (values / totals).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
