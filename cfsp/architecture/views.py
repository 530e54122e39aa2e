"""Views of an architecture for the pruners: blocks with their FFN and attention, recognised by structure.

A decoder is recognised by the linears that are there and their attribute names, never by a model's or a
repository's name. :mod:`cfsp.pruner.probe` then checks each view numerically before anything is pruned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cfsp.architecture.attention import AttentionView, attention_in
from cfsp.architecture.expert_recognition import experts_in, looks_like_experts
from cfsp.architecture.experts import ExpertsFFN
from cfsp.architecture.ffn import FFN, KNOWN_NAMES, ffn_of
from cfsp.architecture.projection import Projection, is_matrix
from cfsp.architecture.supported import refuse_other_kinds, state_space
from cfsp.architecture.units import UnitKind, Units
from cfsp.architecture.weights import Weights, weights_of
from cfsp.errors import UnsupportedModelError

#: Kinds of submodules, by the names that the stubs of removed ones have in model folders.
Kind = Literal["attention", "mlp"]
KINDS: tuple[Kind, ...] = ("attention", "mlp")


@dataclass(frozen=True)
class Channels:
    """Channels that a metric scores: the inputs of one output projection.

    Attributes:
        block: index of the block.
        kind: ffn, the neurons, which are inputs of down_proj; or attention, the channels of the heads, which are
            inputs of o_proj.
        part: the FFN or the attention; with ``expert``, the expert with the attributes of an FFN.
        expert: in a mixture, the expert whose neurons they are.
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
        """Number of channels, N."""
        return self.part.width

    def weights(self) -> tuple[Tensor, ...]:
        """Return the matrices that meet at the channels, in fp32.

        Returns:
            The input matrices, [N, d] each, then the output projection [d, N]. For an FFN: gate, up and down, or up
            and down. For an attention: q, k, v and o.
        """
        return self.part.weights()


@dataclass(frozen=True)
class BlockView:
    """One decoder block.

    Attributes:
        index: index of the block in the model.
        module: its module.
        ffn: the FFN; None where an earlier pruning removed it.
        attention: the attention; None where an earlier pruning removed it, or its projections are not recognised.
        attention_removed: tells these two cases apart.
    """

    index: int
    module: nn.Module
    ffn: FFN | ExpertsFFN | None
    attention: AttentionView | None
    attention_removed: bool = False

    @property
    def experts(self) -> ExpertsFFN | None:
        """The FFN where it is a mixture of experts; else None."""
        return self.ffn if isinstance(self.ffn, ExpertsFFN) else None

    def units(self, kind: UnitKind) -> Units:
        """Return the units of a kind that the block can lose: how many, and the parameters of each."""
        if kind == "neurons" and self.ffn is not None:
            return Units(self.ffn.width, self.ffn.neuron_parameters, 1, 1)
        if kind == "experts" and self.experts is not None:
            mixture = self.experts
            return Units(mixture.n_experts, mixture.expert_parameters, mixture.least_experts, mixture.groups)
        if kind == "kv_groups" and self.attention is not None:
            return Units(self.attention.n_kv_heads, self.attention.group_parameters, 1, 1)
        return Units()

    @property
    def channels(self) -> dict[str, Channels]:
        """Removable channels of the block by their kind, without those of experts."""
        by_kind: dict[str, Channels] = {}
        if isinstance(self.ffn, FFN):
            by_kind["ffn"] = Channels(self.index, "ffn", self.ffn)
        if self.attention is not None:
            by_kind["attention"] = Channels(self.index, "attention", self.attention)
        return by_kind


@dataclass(frozen=True)
class DecoderView:
    """A causal language model as a list of blocks.

    Attributes:
        model: the model.
        decoder: the model without its LM head.
        blocks: its decoder blocks, in order.
    """

    model: Any
    decoder: Any
    blocks: tuple[BlockView, ...]

    @property
    def container(self) -> nn.ModuleList:
        """The nn.ModuleList that holds the blocks."""
        first = self.blocks[0].module
        lists = (module for module in self.decoder.modules() if isinstance(module, nn.ModuleList))
        return next(module for module in lists if len(module) and module[0] is first)

    @property
    def device(self) -> torch.device:
        """Device of token ids: that of the embeddings; for a streamed model, the device that computes."""
        return self.weights.device

    @property
    def weights(self) -> Weights:
        """Weights of the model, in memory or streamed."""
        return weights_of(self.model)

    @property
    def mixtures(self) -> list[BlockView]:
        """The blocks whose FFN is a mixture of experts."""
        return [block for block in self.blocks if block.experts is not None]

    def units(self, kind: UnitKind) -> list[Units]:
        """Return the units of a kind of each block."""
        return [block.units(kind) for block in self.blocks]

    @property
    def widths(self) -> list[int]:
        """FFN neurons of each block; for a mixture, those of one expert; 0 where there is no FFN."""
        return [units.n for units in self.units("neurons")]

    @property
    def kv_groups(self) -> list[int]:
        """KV groups of each block; 0 where there is no (recognised) attention."""
        return [units.n for units in self.units("kv_groups")]

    @property
    def model_parameters(self) -> int:
        """Parameters of the model; tied ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def decoder_parameters(self) -> int:
        """Parameters of the blocks (attention, FFN and norms), without embeddings, final norm and LM head."""
        return sum(parameter.numel() for block in self.blocks for parameter in block.module.parameters())


def resolve(model: Any) -> DecoderView:
    """Recognise the decoder of a transformers causal language model (also on the meta device).

    Raises:
        UnsupportedModelError: the structure is not recognised; says what was looked for and what is there.
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
    """Return whether ``module`` is the stub of a removed submodule of this kind (cfsp.pruned_model.sizes_template)."""
    return getattr(module, "removed", None) == kind


def view_block(model: Any, name: str, index: int, block: nn.Module) -> BlockView:
    """Recognise the FFN and the attention of one block.

    Args:
        model: the model that the block belongs to.
        name: name of the block in messages.
        index: index of the block.
        block: its module.

    Raises:
        UnsupportedModelError: there is not exactly one FFN, and none was removed.
    """
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
    ffns = [ffn for module in block.modules() if (ffn := ffn_of(module)) is not None]
    attention_removed = any(is_removed(module, "attention") for module in block.modules())
    if not ffns and any(is_removed(module, "mlp") for module in block.modules()):
        return BlockView(index, block, None, attention, attention_removed)
    if len(ffns) != 1:
        shapes = [
            f"{child_name} {tuple(child.weight.shape)}"
            for child_name, child in block.named_modules()
            if is_matrix(child)
        ]
        linears = ", ".join(shapes[:4]) + (f" and {len(shapes) - 4} more" if len(shapes) > 4 else "")
        reason = "no FFN" if not ffns else f"{len(ffns)} FFNs (a mixture of experts without a router?)"
        if not ffns and (mixer := state_space(block)):
            reason = f"a state-space mixer ({mixer}) and no FFN"
        raise UnsupportedModelError(
            f"{type(model).__name__}: {reason} in block {name}; looked for one module with linears {KNOWN_NAMES} of "
            f"matching shapes, found: {linears or 'no linear'}"
        )
    return BlockView(index, block, ffns[0], attention, attention_removed)


def is_stub(module: nn.Module) -> bool:
    """Return whether a module stands in the place of a removed submodule."""
    return any(is_removed(module, kind) for kind in KINDS)
