"""The scoring stage: a metric scores FFN neurons, the neurons of experts, and the channels of attention heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from cfsp.config.components import option_of
from cfsp.config.contracts import NeuronImportance
from cfsp.errors import RunError
from cfsp.importance.weight_norm import WeightNorm

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.ffn import FFN
    from cfsp.architecture.views import BlockView, Channels, DecoderView
    from cfsp.calibration.gradients import GradientTerms
    from cfsp.calibration.gram_store import GramMatrices
    from cfsp.calibration.statistics import BlockStatistics, ExpertStatistics, InputStatistics, Statistics
    from cfsp.config.budget import Structure


@dataclass(frozen=True)
class Activation:
    """Statistics of the channels over the calibration set, [N] fp32 each, on the weights' device.

    Attributes:
        rms: root mean square over all tokens.
        mean: mean over all tokens.
        variance: population variance over all tokens.
        mean_norm: mean over the sequences of the L2 norm over a sequence's tokens, divided by sqrt(T).
        gradients: projection name -> gradient terms (:mod:`cfsp.calibration.gradients`), for metrics that require them.
        gram: X^T X per token [N, N] (:mod:`cfsp.calibration.gram`), for metrics that require it.
    """

    rms: Tensor
    mean: Tensor
    variance: Tensor
    mean_norm: Tensor
    gradients: Mapping[str, Tensor] | None = None
    gram: Tensor | None = None


@dataclass(frozen=True)
class Scores:
    """Scores of the removable units of each block, fp64 on CPU; empty for kinds that are not pruned.

    All experts of a mixture keep the same number of neurons, so allocators see slots there: slot i is the i-th best
    neuron of every expert, and its score is their sum.

    Attributes:
        neurons: scores [N] of the neurons of each block; of a mixture those of its slots; with structure experts those
            of the experts [E].
        kv_groups: scores [groups, channels of a group] of each block.
        distances: name -> block distances [L].
        experts: scores [E, N] of the neurons of each expert of a mixture; None for other blocks.
    """

    neurons: tuple[Tensor, ...]
    kv_groups: tuple[Tensor, ...]
    distances: dict[str, Tensor]
    experts: tuple[Tensor | None, ...] = ()

    def only(self, blocks: Sequence[int]) -> Scores:
        """Return the scores of these blocks alone."""
        return Scores(
            tuple(self.neurons[block] for block in blocks),
            tuple(self.kv_groups[block] for block in blocks),
            {metric: values[list(blocks)] for metric, values in self.distances.items()},
            tuple(self.experts[block] for block in blocks) if self.experts else (),
        )

    def units(self, block: int) -> Tensor:
        """Return the scores by which the kept units of a block are chosen, [N], or [E, N] in a mixture."""
        experts = self.experts[block] if self.experts else None
        return self.neurons[block] if experts is None else experts


def required_items(importance: NeuronImportance) -> tuple[str, ...]:
    """Return the calibration items that a metric requires beside the core statistics."""
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
    """Score the units of every block.

    Args:
        structure: kinds of units to score.
        gradients: gradient terms of every block, where the metric requires them.
        scored: block index -> scores computed earlier, which are used unchanged.
        grams: Gram matrices, where the metric requires them.

    Raises:
        RunError: a score is not finite; the message names the block.
    """
    neurons: list[Tensor] = []
    kv_groups: list[Tensor] = []
    experts: list[Tensor | None] = []
    for block, block_statistics in zip(view.blocks, statistics.blocks, strict=True):
        terms = None if gradients is None else gradients.blocks[block.index]
        if scored and block.index in scored:
            neurons_of, groups_of = scored[block.index]
        else:
            with view.weights.resident(block):
                neurons_of, groups_of = score_block(block, block_statistics, importance, structure, terms, grams)
        experts.append(neurons_of if neurons_of.dim() == 2 else None)
        neurons.append(neurons_of if neurons_of.dim() == 1 else slot_scores(neurons_of, block_statistics.experts))
        kv_groups.append(groups_of)
    return Scores(tuple(neurons), tuple(kv_groups), block_distances_by_name(statistics), tuple(experts))


def block_distances_by_name(statistics: Statistics) -> dict[str, Tensor]:
    """Return the block distances by name, each [L]."""
    return {metric: statistics.distance(metric) for metric in statistics.blocks[0].distances}


def slot_scores(experts: Tensor, statistics: ExpertStatistics | None) -> Tensor:
    """Sum the sorted scores of all experts of a mixture into scores [N] of its slots.

    Args:
        experts: scores of the neurons of every expert, [E, N].
        statistics: token counts of the experts; an expert that saw no token adds nothing.
    """
    routed = experts if statistics is None else experts[statistics.tokens > 0]
    return routed.sort(dim=1, descending=True).values.sum(0)


def score_block(
    block: BlockView,
    statistics: BlockStatistics,
    importance: NeuronImportance,
    structure: Structure,
    gradients: Mapping[str, Tensor] | None = None,
    grams: GramMatrices | None = None,
) -> tuple[Tensor, Tensor]:
    """Score one block whose weights are in memory.

    Returns:
        Scores of neurons [N], in a mixture of every expert's [E, N], and of KV groups [groups, channels of a group];
        empty for kinds outside the structure.
    """
    import torch

    neurons, kv_groups = torch.zeros(0, dtype=torch.float64), torch.zeros(0, 1, dtype=torch.float64)
    channels = block.channels
    if structure != "heads" and "ffn" in channels and statistics.ffn is not None:
        gram = read_gram(block, "ffn", importance, grams)
        neurons = _scored(channels["ffn"], statistics.ffn, importance, gradients, gram)
    if structure in ("ffn", "heads_ffn") and block.experts is not None and statistics.ffn is not None:
        neurons = score_experts(block, statistics, importance, gradients, grams)
    if structure in ("heads", "heads_ffn") and block.attention is not None and statistics.attention is not None:
        gram = read_gram(block, "attention", importance, grams)
        values = _scored(channels["attention"], statistics.attention, importance, gradients, gram)
        kv_groups = values.unflatten(0, (block.attention.n_kv_heads, -1))
    return neurons, kv_groups


def score_experts(
    block: BlockView,
    statistics: BlockStatistics,
    importance: NeuronImportance,
    gradients: Mapping[str, Tensor] | None = None,
    grams: GramMatrices | None = None,
) -> Tensor:
    """Score the neurons of the experts of a mixture, each on its own matrices and statistics.

    An expert that saw no token has neither activations nor gradients. Its neurons are ranked by their
    weights, as if all of them were equally active. A metric of Gram matrices ranks so too the neurons of an expert
    that saw fewer tokens than it has neurons; their scale is the expert's mean square activation.

    Returns:
        Scores [E, N].
    """
    import torch

    # Start-up time: loads torch.
    from cfsp.architecture.views import Channels
    from cfsp.calibration.statistics import InputStatistics

    mixture, inputs = block.experts, statistics.ffn
    assert mixture is not None
    assert inputs is not None
    expert_grams = _expert_grams(block, statistics, importance, grams)
    unseen = set(statistics.experts.unseen) if statistics.experts is not None else set()
    alike = torch.ones(mixture.width, dtype=torch.float64)
    rows = []
    for expert in range(mixture.n_experts):
        channels = Channels(block.index, "ffn", cast("FFN", mixture.expert(expert)), expert)
        own, metric = inputs.expert(expert), importance
        if expert in unseen:
            own = InputStatistics(torch.zeros_like(alike), alike, alike)
            metric = WeightNorm() if "gradients" in required_items(importance) else importance
        terms = None if gradients is None else {name: values[:, expert] for name, values in gradients.items()
                                                if values.dim() == 3}  # fmt: skip
        rows.append(_scored(channels, own, metric, terms, next(expert_grams)))
    return torch.stack(rows)


def _expert_grams(
    block: BlockView, statistics: BlockStatistics, importance: NeuronImportance, grams: GramMatrices | None
) -> Iterator[Tensor | None]:
    """Yield the Gram matrix [N, N] of each expert for a metric that requires it, else None.

    A token that is not routed to an expert counts as 0, as in the core statistics. So the errors of experts and blocks
    are per calibration token, and can be compared. An expert with too few tokens has a multiple of the identity.
    """
    import torch

    # Start-up time: loads torch.
    from cfsp.calibration.gram import expert_kind
    from cfsp.calibration.gram_store import few_token_experts

    mixture, inputs = block.experts, statistics.ffn
    assert mixture is not None
    assert inputs is not None
    if grams is None or "gram" not in required_items(importance):
        yield from [None] * mixture.n_experts
        return
    few = set(few_token_experts(block, grams))
    for expert in range(mixture.n_experts):
        mean_square = inputs.expert(expert).mean_square
        if expert in few:
            yield torch.eye(mixture.width) * (float(mean_square.mean()) or 1.0)
            continue
        matrix = grams.read(block.index, expert_kind(expert)).matrix
        # The share of the tokens that are routed to the expert, on the tokens of the matrix and of the statistics.
        trace = float(matrix.diagonal().double().sum())
        yield matrix * (float(mean_square.sum()) / trace if trace else 0.0)


def read_gram(block: BlockView, kind: str, importance: NeuronImportance, grams: GramMatrices | None) -> Tensor | None:
    """Return the Gram matrix of a projection for a metric that requires it."""
    if grams is None or "gram" not in required_items(importance):
        return None
    return grams.read(block.index, kind).matrix


def _scored(
    channels: Channels,
    inputs: InputStatistics,
    importance: NeuronImportance,
    gradients: Mapping[str, Tensor] | None,
    gram: Tensor | None,
) -> Tensor:
    values = importance.score(channels, activation_for(channels, inputs, gradients, gram)).double().cpu()
    if not values.isfinite().all():
        raise RunError(
            f"block {channels.block}: {int((~values.isfinite()).sum())} of {len(values)} {channels.kind} scores "
            f"{'' if channels.expert is None else f'of expert {channels.expert} '}of "
            f"{option_of('importance', importance)} are not finite; try model.dtype=float32"
        )
    return values


def activation_for(
    channels: Channels, inputs: InputStatistics, gradients: Mapping[str, Tensor] | None, gram: Tensor | None
) -> Activation:
    """Return the statistics of the channels that a metric sees, on the device of their weights."""
    device = channels.output.weight.device
    rms, mean, variance, mean_norm = (
        value.to(device).float() for value in (inputs.rms, inputs.mean, inputs.variance, inputs.mean_norm)
    )
    return Activation(rms, mean, variance, mean_norm, gradients, None if gram is None else gram.to(device))


def shares(values: Tensor, totals: Tensor) -> Tensor:
    """Return ``values / totals``, with 0/0 as 0 (dead columns)."""
    return (values / totals).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
