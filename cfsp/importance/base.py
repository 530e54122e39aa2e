"""What a metric is, and the scores it gives to FFN neurons and to the channels of attention heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from cfsp.components import option_of
from cfsp.contracts import NeuronImportance
from cfsp.errors import RunError, UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.allocate.budget import Structure
    from cfsp.calibrate.gradients import GradientTerms
    from cfsp.calibrate.gram import GramMatrices
    from cfsp.calibrate.statistics import BlockStatistics, ExpertStatistics, InputStatistics, Statistics
    from cfsp.models.ffn import FFN
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


@dataclass(frozen=True)
class Scores:
    """Per block, fp64 on CPU: ``neurons`` [N]; ``kv_groups`` [groups, channels of a group]; empty where not pruned.

    ``distances``: metric -> [L] block distances. ``experts``: of a mixture the scores of every expert's neurons [E, N],
    None elsewhere. All experts keep the same number, so allocators see ``neurons`` of slots there: slot i is every
    expert's i-th best neuron, and its score their sum. Where whole experts go ``neurons`` are theirs [E].
    """

    neurons: tuple[Tensor, ...]
    kv_groups: tuple[Tensor, ...]
    distances: dict[str, Tensor]
    experts: tuple[Tensor | None, ...] = ()

    def only(self, blocks: Sequence[int]) -> Scores:
        """The same with these blocks alone."""
        return Scores(
            tuple(self.neurons[block] for block in blocks),
            tuple(self.kv_groups[block] for block in blocks),
            {metric: values[list(blocks)] for metric, values in self.distances.items()},
            tuple(self.experts[block] for block in blocks) if self.experts else (),
        )

    def units(self, block: int) -> Tensor:
        """What the kept units of a block are chosen by: :attr:`experts` where it is one, else :attr:`neurons`."""
        experts = self.experts[block] if self.experts else None
        return self.neurons[block] if experts is None else experts


def required(importance: NeuronImportance) -> tuple[str, ...]:
    """Return the items of the calibration that a metric needs beside the core set of statistics."""
    return importance.requires


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

    neurons: list[Tensor] = []
    kv_groups: list[Tensor] = []
    experts: list[Tensor | None] = []
    for block, found in zip(view.blocks, statistics.blocks, strict=True):
        terms = None if gradients is None else gradients.blocks[block.index]
        if scored and block.index in scored:
            neurons_of, groups_of = scored[block.index]
        else:
            with resident(view, block):
                neurons_of, groups_of = score_block(block, found, importance, structure, terms, grams)
        experts.append(neurons_of if neurons_of.dim() == 2 else None)
        neurons.append(neurons_of if neurons_of.dim() == 1 else slots(neurons_of, found.experts))
        kv_groups.append(groups_of)
    return Scores(tuple(neurons), tuple(kv_groups), distances_of(statistics), tuple(experts))


def distances_of(statistics: Statistics) -> dict[str, Tensor]:
    """Metric -> [L] block distances."""
    return {metric: statistics.distance(metric) for metric in statistics.blocks[0].distances}


def slots(experts: Tensor, found: ExpertStatistics | None) -> Tensor:
    """Scores [N] of the slots of a mixture, from those of every expert's neurons [E, N]; unseen experts add nothing."""
    seen = experts if found is None else experts[found.tokens > 0]
    return seen.sort(dim=1, descending=True).values.sum(0)


def score_block(
    block: BlockView,
    found: BlockStatistics,
    importance: NeuronImportance,
    structure: Structure,
    gradients: Mapping[str, Tensor] | None = None,
    grams: GramMatrices | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores of one block: neurons [N] and KV groups [groups, channels of a group]; empty where not asked for.

    Of a mixture of experts the neurons are [E, N]: every expert is scored on its own matrices and statistics.
    """
    import torch

    neurons, kv_groups = torch.zeros(0, dtype=torch.float64), torch.zeros(0, 1, dtype=torch.float64)
    channels = block.channels
    if structure != "heads" and "ffn" in channels and found.ffn is not None:
        neurons = _scored(channels["ffn"], found.ffn, importance, gradients, grams)
    if structure in ("ffn", "heads_ffn") and block.experts is not None and found.ffn is not None:
        neurons = score_experts(block, found, importance, gradients)
    if structure in ("heads", "heads_ffn") and block.attention is not None and found.attention is not None:
        values = _scored(channels["attention"], found.attention, importance, gradients, grams)
        kv_groups = values.unflatten(0, (block.attention.n_kv_heads, -1))
    return neurons, kv_groups


def score_experts(
    block: BlockView,
    found: BlockStatistics,
    importance: NeuronImportance,
    gradients: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Scores [E, N] of the neurons of a mixture's experts.

    An expert that saw no token has nothing that activations or gradients could tell: its neurons are ranked by their
    weights, as if all of them were active alike.

    Raises:
        UnsupportedModelError: the metric needs Gram matrices.
    """
    import torch

    from cfsp.calibrate.statistics import InputStatistics
    from cfsp.importance.weight_norm import WeightNorm
    from cfsp.models.views import Channels

    mixture, inputs = block.experts, found.ffn
    assert mixture is not None
    assert inputs is not None
    if "gram" in required(importance):
        raise UnsupportedModelError(no_grams(block, importance))
    unseen = set(found.experts.unseen) if found.experts is not None else set()
    alike = torch.ones(mixture.width, dtype=torch.float64)
    rows = []
    for expert in range(mixture.n_experts):
        channels = Channels(block.index, "ffn", cast("FFN", mixture.expert(expert)), expert)
        own, metric = inputs.expert(expert), importance
        if expert in unseen:
            own = InputStatistics(torch.zeros_like(alike), alike, alike)
            metric = WeightNorm() if "gradients" in required(importance) else importance
        terms = None if gradients is None else {name: values[:, expert] for name, values in gradients.items()
                                                if values.dim() == 3}  # fmt: skip
        rows.append(_scored(channels, own, metric, terms, None))
    return torch.stack(rows)


def no_grams(block: BlockView, importance: NeuronImportance) -> str:
    """Why a metric of Gram matrices cannot score experts, and the way out."""
    return (
        f"block {block.index} is a mixture of experts: {option_of('importance', importance)} goes by Gram "
        "matrices, which are not collected for experts; use importance=cfsp, wanda, flap or another without them"
    )


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
            f"block {channels.block}: {int((~values.isfinite()).sum())} of {len(values)} {channels.kind} scores "
            f"{'' if channels.expert is None else f'of expert {channels.expert} '}of "
            f"{option_of('importance', importance)} are not finite; try model.dtype=float32"
        )
    return values


def shares(values: Tensor, totals: Tensor) -> Tensor:
    """``values / totals`` where 0/0 counts as 0 (dead columns)."""
    return (values / totals).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
