"""Description of a model from its view: parameters of its parts, and its blocks.

Everything that ``cfsp inspect`` reads from a :class:`cfsp.architecture.views.DecoderView` is read here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from cfsp.architecture.latent import has_latent_attention

if TYPE_CHECKING:
    from torch import nn

    from cfsp.architecture.experts import ExpertsFFN
    from cfsp.architecture.views import BlockView, DecoderView
    from cfsp.inspection.history import History, OriginalBlockSizes

#: Parts of a model in the order of the report; other is e.g. a projection between embeddings and blocks.
PARTS = ("embeddings", "attention", "ffn", "norms", "head", "other")
#: Names of a block's children in transformers' decoders; attention is matched first, since it may have experts.
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FFN = re.compile(r"mlp|ffn|ff\b|feed_?forward|moe|expert|router|fc_?\d", re.IGNORECASE)


@dataclass(frozen=True)
class ExpertFacts:
    """Mixture of experts of a block.

    Attributes:
        n: number of routed experts.
        top_k: experts that see a token.
        groups: groups of experts that the router chooses from first; 1: no groups.
        parameters: parameters that go with an expert.
        shared: width of the FFN that sees every token; None: there is none, or it is not recognised.
        n_before: number of experts before the model was pruned; None: as now, or not known.
    """

    n: int
    top_k: int
    groups: int
    parameters: int
    shared: int | None = None
    n_before: int | None = None


@dataclass(frozen=True)
class FfnFacts:
    """FFN of a block; in a mixture the sizes are those of each expert.

    Attributes:
        kind: gated, plain or experts.
        width: neurons.
        neuron_parameters: parameters that go with a neuron; in a mixture, with the same neuron of all experts.
        width_before: neurons before the model was pruned; None: as now, or not known.
        experts: the mixture; None: the FFN is none.
    """

    kind: str
    width: int
    neuron_parameters: int
    width_before: int | None = None
    experts: ExpertFacts | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the facts for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "experts" or value is not None}


@dataclass(frozen=True)
class AttentionFacts:
    """Attention of a block.

    Attributes:
        heads: query heads.
        kv_groups: KV groups.
        head_dim: size of a head.
        group_parameters: parameters that go with a KV group.
        window: tokens that are seen; None: all.
        groups_before: KV groups before the model was pruned; None: as now, or not known.
    """

    heads: int
    kv_groups: int
    head_dim: int
    group_parameters: int
    window: int | None = None
    groups_before: int | None = None

    @property
    def kind(self) -> str:
        """Return multi-head, grouped-query or multi-query."""
        if self.heads == self.kv_groups:
            return "multi-head"
        return "multi-query" if self.kv_groups == 1 else "grouped-query"


@dataclass(frozen=True)
class BlockFacts:
    """Structure and sizes of one block.

    Attributes:
        ffn: its FFN; None: removed.
        attention: its attention; None: removed, latent or not recognised.
        attention_known: whether the attention is recognised, or known to be removed.
        parameters: parameters of the block.
        latent: whether it is multi-head latent attention, which has no KV groups.
    """

    ffn: FfnFacts | None
    attention: AttentionFacts | None
    attention_known: bool
    parameters: int
    latent: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the facts for JSON."""
        attention = None if self.attention is None else {"kind": self.attention.kind, **asdict(self.attention)}
        facts = {**asdict(self), "ffn": None if self.ffn is None else self.ffn.as_dict(), "attention": attention}
        return {name: value for name, value in facts.items() if name != "latent" or value}


def count_parameters(view: DecoderView) -> dict[str, int]:
    """Count the parameters of each part, each parameter once; tied ones count as embeddings."""
    model = view.model
    inside = {id(m): name for block in view.blocks for name, m in block.module.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    counts = dict.fromkeys(PARTS, 0)
    counted: set[int] = set()
    for module in (embeddings, *model.modules()):
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in counted:
                counted.add(id(parameter))
                part = "head" if module is head else _part(module, inside.get(id(module)))
                counts[part] += parameter.numel()
    return counts


def _part(module: nn.Module, name: str | None) -> str:
    """Return the part that a module belongs to.

    Args:
        module: the module.
        name: its name within its block; None: it is outside of the blocks.
    """
    kind = type(module).__name__.lower()
    if "norm" in kind:
        return "norms"
    if name is None:
        return "embeddings" if "embedding" in kind else "other"
    first = name.partition(".")[0]
    if _ATTENTION.search(first):
        return "attention"
    return "ffn" if _FFN.search(first) else "other"


def is_tied(view: DecoderView) -> bool:
    """Return whether the head's weight is that of the embeddings."""
    head = view.model.get_output_embeddings()
    return head is not None and head.weight is view.model.get_input_embeddings().weight


def describe_blocks(view: DecoderView, history: History | None) -> list[BlockFacts]:
    """Return the facts of every block, in order."""
    known = history.blocks if history is not None and len(history.blocks) == len(view.blocks) else None
    return [
        _block(block, None if known is None else known[at], _window(view.model.config, at))
        for at, block in enumerate(view.blocks)
    ]


def _block(block: BlockView, before: OriginalBlockSizes | None, window: int | None) -> BlockFacts:
    ffn, attention = block.ffn, block.attention
    width, groups = (None, None) if before is None else (before.width, before.kv_groups)
    return BlockFacts(
        ffn=None
        if ffn is None
        else FfnFacts(
            ffn.kind,
            ffn.width,
            ffn.neuron_parameters,
            width if width != ffn.width else None,
            None if block.experts is None else _experts(block.experts, None if before is None else before.experts),
        ),
        attention=None
        if attention is None
        else AttentionFacts(
            attention.n_heads,
            attention.n_kv_heads,
            attention.head_dim,
            attention.group_parameters,
            window,
            groups if groups != attention.n_kv_heads else None,
        ),
        attention_known=attention is not None or block.attention_removed,
        parameters=sum(parameter.numel() for parameter in block.module.parameters()),
        latent=attention is None and has_latent_attention(block.module),
    )


def _experts(mixture: ExpertsFFN, before: int | None) -> ExpertFacts:
    return ExpertFacts(
        mixture.n_experts,
        mixture.top_k,
        mixture.groups,
        mixture.expert_parameters,
        None if mixture.shared is None else mixture.shared.width,
        before if before != mixture.n_experts else None,
    )


def _window(config: Any, block: int) -> int | None:
    """Return the tokens that the attention of a block sees, by transformers' configuration; None: all of them."""
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if not isinstance(window, int) or getattr(config, "use_sliding_window", True) is False:
        return None
    if kinds is None:
        return window
    return window if block < len(kinds) and kinds[block] == "sliding_attention" else None


def equal_blocks(blocks: Sequence[BlockFacts]) -> Iterator[tuple[list[int], BlockFacts]]:
    """Yield groups of equal blocks with their indices, in the order of their first blocks."""
    indices_of: dict[BlockFacts, list[int]] = {}
    for index, block in enumerate(blocks):
        indices_of.setdefault(block, []).append(index)
    yield from ((indices, block) for block, indices in indices_of.items())


def ranges(indices: Sequence[int]) -> str:
    """Return ascending indices as text, with runs folded.

    Example:
        >>> ranges([0, 1, 2, 3, 5])
        '0-3, 5'
        >>> ranges([0, 2, 4, 6])  # every nth index
        '0, 2, ..., 6'
    """
    steps = {after - before for before, after in pairwise(indices)}
    if len(indices) > 3 and len(steps) == 1 and steps != {1}:
        return f"{indices[0]}, {indices[1]}, ..., {indices[-1]}"
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
