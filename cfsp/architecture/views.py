"""What the pruners see of an architecture: blocks, their FFN, their attention. Resolved by structure.

A decoder is recognised by the linears that are there and their attribute names, never by a model's or a
repository's name. :mod:`cfsp.pruner.probe` then checks each view numerically before anything is pruned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cfsp.architecture.attention import AttentionView, attention_in
from cfsp.architecture.experts import ExpertsFFN, experts_in, looks_like_experts
from cfsp.architecture.ffn import FFN, KNOWN_NAMES, ffn_of
from cfsp.architecture.projection import Projection, is_matrix
from cfsp.architecture.supported import refuse_other_kinds, state_space
from cfsp.errors import UnsupportedModelError


@dataclass(frozen=True)
class Channels:
    """What a metric scores: the input channels of one output projection of block ``block``.

    kind ffn: the neurons, inputs of down_proj; attention: the channels of the heads, inputs of o_proj. ``expert``: of
    a mixture, whose neurons they are; ``part`` then has what metrics read of an FFN.
    """

    block: int
    kind: Literal["ffn", "attention"]
    part: FFN | AttentionView
    expert: int | None = None

    @property
    def output(self) -> Projection:
        """down_proj or o_proj, weight [d, N]."""
        return self.part.output

    @property
    def n(self) -> int:
        return self.part.width

    def weights(self) -> tuple[Tensor, ...]:
        """The matrices that meet at the channels, fp32: those that make them, [N, d] each, then the output's [d, N].

        ffn: gate, up, down, or up and down; attention: q, k, v, o.
        """
        return self.part.weights()


@dataclass(frozen=True)
class BlockView:
    """One decoder block. ``ffn`` and ``attention`` are None where an earlier pruning took the submodule away.

    ``attention`` is also None where its projections were not recognised; ``attention_removed`` tells the two apart.
    """

    index: int
    module: nn.Module
    ffn: FFN | ExpertsFFN | None
    attention: AttentionView | None
    attention_removed: bool = False

    @property
    def experts(self) -> ExpertsFFN | None:
        """The FFN where it is a mixture of experts."""
        return self.ffn if isinstance(self.ffn, ExpertsFFN) else None

    @property
    def channels(self) -> dict[str, Channels]:
        """kind -> the removable channels that this block has, of its own single matrices: none of experts."""
        found: dict[str, Channels] = {}
        if isinstance(self.ffn, FFN):
            found["ffn"] = Channels(self.index, "ffn", self.ffn)
        if self.attention is not None:
            found["attention"] = Channels(self.index, "attention", self.attention)
        return found


@dataclass(frozen=True)
class DecoderView:
    """A causal language model as a list of blocks. ``decoder`` is the model without its LM head."""

    model: Any
    decoder: Any
    blocks: tuple[BlockView, ...]

    @property
    def container(self) -> nn.ModuleList:
        """The list in the model that holds the blocks."""
        first = self.blocks[0].module
        lists = (module for module in self.decoder.modules() if isinstance(module, nn.ModuleList))
        return next(module for module in lists if len(module) and module[0] is first)

    @property
    def device(self) -> torch.device:
        """Where the token ids go: the device of the embeddings; of a streamed model, where it computes."""
        store = getattr(self.model, "_cfsp_streamed", None)  # :mod:`cfsp.model.streamed`, which builds on views
        if store is not None:
            return store.device
        return self.decoder.get_input_embeddings().weight.device

    @property
    def mixtures(self) -> list[BlockView]:
        """The blocks whose FFN is a mixture of experts."""
        return [block for block in self.blocks if block.experts is not None]

    @property
    def widths(self) -> list[int]:
        """FFN neurons of each block, of a mixture those of one expert; 0 where there is no FFN."""
        return [block.ffn.width if block.ffn is not None else 0 for block in self.blocks]

    @property
    def kv_groups(self) -> list[int]:
        """KV groups of each block; 0 where there is no (recognised) attention."""
        return [block.attention.n_kv_heads if block.attention is not None else 0 for block in self.blocks]

    @property
    def model_parameters(self) -> int:
        """Every parameter once, tied ones too."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def decoder_parameters(self) -> int:
        """Parameters of the blocks: attention, FFN and norms; no embeddings, no final norm, no head."""
        return sum(parameter.numel() for block in self.blocks for parameter in block.module.parameters())


def resolve(model: Any) -> DecoderView:
    """Recognise the decoder of a transformers causal language model (also on the meta device).

    Raises:
        UnsupportedModelError: says what was looked for and what was found.
    """
    refuse_other_kinds(model)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else getattr(model, "base_model", model)
    lists = [(name, module) for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)]
    candidates = [(name, module) for name, module in lists if len(module) and _looks_like_block(module[0])]
    # Lists within a block (the experts of a mixture) may be longer than that of the blocks.
    names = [name for name, _ in candidates]
    candidates = [(n, module) for n, module in candidates if not any(n.startswith(f"{other}.") for other in names)]
    if not candidates:
        raise UnsupportedModelError(
            f"{type(model).__name__}: no list of decoder blocks was found; looked for an nn.ModuleList whose items "
            f"hold linear layers, found lists: {', '.join(name for name, _ in lists) or 'none'}"
        )
    name, blocks = max(candidates, key=lambda item: len(item[1]))
    views = tuple(view_block(model, f"{name}.{index}", index, block) for index, block in enumerate(blocks))
    return DecoderView(model, decoder, views)


def _looks_like_block(module: nn.Module) -> bool:
    # A mixture whose block has lost its attention may hold no linear at all.
    return sum(is_matrix(child) for child in module.modules()) >= 2 or looks_like_experts(module)


def is_removed(module: nn.Module, kind: Literal["attention", "mlp"]) -> bool:
    """Whether ``module`` stands where a pruning removed an attention or FFN submodule (see pruned_template)."""
    return getattr(module, "removed", None) == kind


def view_block(model: Any, name: str, index: int, block: nn.Module) -> BlockView:
    """What is recognised in one block; ``name`` is for messages."""
    attention = attention_in(model, block)
    mixture = experts_in(model, block)
    if mixture is not None:
        removed = any(is_removed(module, "attention") for module in block.modules())
        return BlockView(index, block, mixture, attention, removed)
    if looks_like_experts(block):
        raise UnsupportedModelError(
            f"{type(model).__name__}: block {name} holds matrices of several experts, but no module with gate_up_proj "
            "and down_proj [experts, ...] beside one router with a row of weights per expert was found"
        )
    found = [ffn for module in block.modules() if (ffn := ffn_of(module)) is not None]
    attention_removed = any(is_removed(module, "attention") for module in block.modules())
    if not found and any(is_removed(module, "mlp") for module in block.modules()):
        return BlockView(index, block, None, attention, attention_removed)
    if len(found) != 1:
        shapes = [
            f"{child_name} {tuple(child.weight.shape)}"
            for child_name, child in block.named_modules()
            if is_matrix(child)
        ]
        linears = ", ".join(shapes[:4]) + (f" and {len(shapes) - 4} more" if len(shapes) > 4 else "")
        what = "no FFN" if not found else f"{len(found)} FFNs (a mixture of experts without a router?)"
        if not found and (mixer := state_space(block)):
            what = f"a state-space mixer ({mixer}) and no FFN"
        raise UnsupportedModelError(
            f"{type(model).__name__}: {what} in block {name}; looked for one module with linears {KNOWN_NAMES} of "
            f"matching shapes, found: {linears or 'no linear'}"
        )
    return BlockView(index, block, found[0], attention, attention_removed)


Kind = Literal["attention", "mlp"]


KINDS: tuple[Kind, ...] = ("attention", "mlp")


def is_stub(module: nn.Module) -> bool:
    """Whether a module stands where a submodule was removed."""
    return any(is_removed(module, kind) for kind in KINDS)
