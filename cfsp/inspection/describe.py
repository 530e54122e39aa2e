"""What a view says of a model: parameters of its parts, and its blocks.

All that reads a :class:`cfsp.architecture.views.DecoderView` is in here.
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
    from cfsp.inspection.history import Before, History

#: In the order of the report; other: what is none of these, e.g. a projection between embeddings and blocks.
PARTS = ("embeddings", "attention", "ffn", "norms", "head", "other")
#: Names of a block's children in transformers' decoders; attention is asked first (an attention may have experts).
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FFN = re.compile(r"mlp|ffn|ff\b|feed_?forward|moe|expert|router|fc_?\d", re.IGNORECASE)


@dataclass(frozen=True)
class ExpertFacts:
    """n: routed experts; top_k: that see a token; groups: that the router chooses first, 1: none; parameters: that go
    with one expert; shared: width of the FFN that sees every token, None: there is none, or not recognised;
    n_before: as ``width_before``."""

    n: int
    top_k: int
    groups: int
    parameters: int
    shared: int | None = None
    n_before: int | None = None


@dataclass(frozen=True)
class FfnFacts:
    """kind: gated, plain or experts; width: neurons; neuron_parameters: that go with one; width_before: of the model
    before it was pruned, None where nothing went or that is not known. Of experts: of each, and with one of each."""

    kind: str
    width: int
    neuron_parameters: int
    width_before: int | None = None
    experts: ExpertFacts | None = None

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "experts" or value is not None}


@dataclass(frozen=True)
class AttentionFacts:
    """heads: query heads; window: tokens that are seen, None: all; groups_before: as ``width_before`` of the FFN."""

    heads: int
    kv_groups: int
    head_dim: int
    group_parameters: int
    window: int | None = None
    groups_before: int | None = None

    @property
    def kind(self) -> str:
        if self.heads == self.kv_groups:
            return "multi-head"
        return "multi-query" if self.kv_groups == 1 else "grouped-query"


@dataclass(frozen=True)
class BlockFacts:
    """One block. ``ffn`` None: removed; ``attention`` None: removed, or (``attention_known`` False) not recognised;
    latent: or it is multi-head latent attention, which has no KV groups."""

    ffn: FfnFacts | None
    attention: AttentionFacts | None
    attention_known: bool
    parameters: int
    latent: bool = False

    def as_dict(self) -> dict[str, Any]:
        attention = None if self.attention is None else {"kind": self.attention.kind, **asdict(self.attention)}
        facts = {**asdict(self), "ffn": None if self.ffn is None else self.ffn.as_dict(), "attention": attention}
        return {name: value for name, value in facts.items() if name != "latent" or value}


def parts_of(view: DecoderView) -> dict[str, int]:
    """Part -> parameters, each once: tied ones are the embeddings'."""
    model = view.model
    inside = {id(m): name for block in view.blocks for name, m in block.module.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    counts = dict.fromkeys(PARTS, 0)
    seen: set[int] = set()
    for module in (embeddings, *model.modules()):
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                part = "head" if module is head else _part(module, inside.get(id(module)))
                counts[part] += parameter.numel()
    return counts


def _part(module: nn.Module, name: str | None) -> str:
    """``name``: within its block; None outside of the blocks."""
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
    """Whether the head's weight is that of the embeddings."""
    head = view.model.get_output_embeddings()
    return head is not None and head.weight is view.model.get_input_embeddings().weight


def blocks_of(view: DecoderView, history: History | None) -> list[BlockFacts]:
    """Every block of the model, in order."""
    known = history.blocks if history is not None and len(history.blocks) == len(view.blocks) else None
    return [
        _block(block, None if known is None else known[at], _window(view.model.config, at))
        for at, block in enumerate(view.blocks)
    ]


def _block(block: BlockView, before: Before | None, window: int | None) -> BlockFacts:
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
    """Tokens that the attention of a block sees, as transformers' configurations say; None: all of them."""
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if not isinstance(window, int) or getattr(config, "use_sliding_window", True) is False:
        return None
    if kinds is None:
        return window
    return window if block < len(kinds) and kinds[block] == "sliding_attention" else None


def alike(blocks: Sequence[BlockFacts]) -> Iterator[tuple[list[int], BlockFacts]]:
    """Equal blocks together, with their indices; in the order of their first ones."""
    found: dict[BlockFacts, list[int]] = {}
    for index, block in enumerate(blocks):
        found.setdefault(block, []).append(index)
    yield from ((indices, block) for block, indices in found.items())


def ranges(indices: Sequence[int]) -> str:
    """``0-3, 5``: ascending indices with runs folded; ``0, 2, ..., 24`` where every nth is meant."""
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
