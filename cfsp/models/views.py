"""What the pruners see of an architecture: blocks, their gated FFN, their attention. Resolved by structure.

A decoder is recognised by the linears that are there and their attribute names, never by a model's or a
repository's name. :mod:`cfsp.pruning.probe` then checks each view numerically before anything is pruned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cfsp.errors import UnsupportedModelError

#: Attribute names of (gate, up, down) in transformers' gated FFNs.
_GATED_NAMES = (("gate_proj", "up_proj", "down_proj"),)
_ATTENTION_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class GatedFFN:
    """``down(act(gate(x)) * up(x))``; gate and up are [N, d], down is [d, N]."""

    module: nn.Module
    gate_name: str
    up_name: str
    down_name: str

    @property
    def gate(self) -> nn.Linear:
        return getattr(self.module, self.gate_name)

    @property
    def up(self) -> nn.Linear:
        return getattr(self.module, self.up_name)

    @property
    def down(self) -> nn.Linear:
        return getattr(self.module, self.down_name)

    @property
    def output(self) -> nn.Linear:
        """The linear whose input channels are the neurons: down."""
        return self.down

    @property
    def width(self) -> int:
        """N, the number of neurons."""
        return self.down.in_features

    @property
    def neuron_parameters(self) -> int:
        """Parameters that go with one neuron: a row of gate, a row of up, a column of down, two biases if any."""
        biases = sum(linear.bias is not None for linear in (self.gate, self.up))
        return self.gate.in_features + self.up.in_features + self.down.out_features + biases

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """(gate [N, d], up [N, d], down [d, N]) in fp32, detached."""
        gate, up, down = (linear.weight.detach().float() for linear in (self.gate, self.up, self.down))
        return gate, up, down


@dataclass(frozen=True)
class AttentionView:
    """Separate q, k, v, o projections; heads are derived from the real shapes.

    What can be removed is a whole KV group: a key and a value head with the ``n_heads // n_kv_heads`` query heads
    that read them. Its channels, columns of o_proj, lie together in the order of the groups.
    """

    module: nn.Module
    n_heads: int
    n_kv_heads: int
    head_dim: int

    @property
    def q_proj(self) -> nn.Linear:
        return self.module.q_proj  # type: ignore[return-value]

    @property
    def k_proj(self) -> nn.Linear:
        return self.module.k_proj  # type: ignore[return-value]

    @property
    def v_proj(self) -> nn.Linear:
        return self.module.v_proj  # type: ignore[return-value]

    @property
    def o_proj(self) -> nn.Linear:
        return self.module.o_proj  # type: ignore[return-value]

    @property
    def output(self) -> nn.Linear:
        """The linear whose input channels the heads are: o_proj."""
        return self.o_proj

    @property
    def width(self) -> int:
        """Channels of all query heads: n_heads * head_dim."""
        return self.n_heads * self.head_dim

    @property
    def queries_per_group(self) -> int:
        return self.n_heads // self.n_kv_heads

    @property
    def group_parameters(self) -> int:
        """Parameters that go with one KV group: its rows of q, k and v with their biases, its columns of o."""
        rows = {self.q_proj: self.queries_per_group, self.k_proj: 1, self.v_proj: 1}
        inputs = sum(n * (linear.in_features + (linear.bias is not None)) for linear, n in rows.items())
        return self.head_dim * (inputs + self.queries_per_group * self.o_proj.out_features)

    def spread(self, rows: Tensor) -> Tensor:
        """Per-row values of k or v, [n_kv_heads * head_dim, ...], to the channels of the query heads that read them."""
        heads = rows.unflatten(0, (self.n_kv_heads, self.head_dim))
        return heads.repeat_interleave(self.queries_per_group, 0).flatten(0, 1)

    def weights(self) -> tuple[Tensor, ...]:
        """(q, k, v [N, d], o [d, N]) in fp32, detached; N = n_heads * head_dim, k and v repeated as they are read."""
        q, k, v, o = (linear.weight.detach().float() for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj))
        return q, self.spread(k), self.spread(v), o


@dataclass(frozen=True)
class Channels:
    """What a metric scores: the input channels of one output projection of block ``block``.

    kind ffn: the neurons, inputs of down_proj; attention: the channels of the heads, inputs of o_proj.
    """

    block: int
    kind: Literal["ffn", "attention"]
    part: GatedFFN | AttentionView

    @property
    def output(self) -> nn.Linear:
        """down_proj or o_proj, weight [d, N]."""
        return self.part.output

    @property
    def n(self) -> int:
        return self.part.width

    def weights(self) -> tuple[Tensor, ...]:
        """The matrices that meet at the channels, fp32: those that make them, [N, d] each, then the output's [d, N].

        ffn: gate, up, down; attention: q, k, v, o.
        """
        return self.part.weights()


@dataclass(frozen=True)
class BlockView:
    """One decoder block. ``ffn`` and ``attention`` are None where an earlier pruning took the submodule away.

    ``attention`` is also None where its projections were not recognised; ``attention_removed`` tells the two apart.
    """

    index: int
    module: nn.Module
    ffn: GatedFFN | None
    attention: AttentionView | None
    attention_removed: bool = False

    @property
    def channels(self) -> dict[str, Channels]:
        """kind -> the removable channels that this block has."""
        found: dict[str, Channels] = {}
        if self.ffn is not None:
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
    def device(self) -> torch.device:
        """Where the token ids go: the device of the embeddings; of a streamed model, where it computes."""
        store = getattr(self.model, "_cfsp_streamed", None)  # :mod:`cfsp.models.streamed`, which builds on views
        if store is not None:
            return store.device
        return self.decoder.get_input_embeddings().weight.device

    @property
    def widths(self) -> list[int]:
        """FFN neurons of each block; 0 where there is no FFN."""
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
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else getattr(model, "base_model", model)
    lists = [(name, module) for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)]
    candidates = [(name, module) for name, module in lists if len(module) and _looks_like_block(module[0])]
    if not candidates:
        raise UnsupportedModelError(
            f"{type(model).__name__}: no list of decoder blocks was found; looked for an nn.ModuleList whose items "
            f"hold linear layers, found lists: {', '.join(name for name, _ in lists) or 'none'}"
        )
    name, blocks = max(candidates, key=lambda item: len(item[1]))
    views = tuple(view_block(model, f"{name}.{index}", index, block) for index, block in enumerate(blocks))
    return DecoderView(model, decoder, views)


def _looks_like_block(module: nn.Module) -> bool:
    return sum(isinstance(child, nn.Linear) for child in module.modules()) >= 2


def is_removed(module: nn.Module, kind: Literal["attention", "mlp"]) -> bool:
    """Whether ``module`` stands where a pruning removed an attention or FFN submodule (see pruned_template)."""
    return getattr(module, "removed", None) == kind


def view_block(model: Any, name: str, index: int, block: nn.Module) -> BlockView:
    """What is recognised in one block; ``name`` is for messages."""
    found = [ffn for module in block.modules() if (ffn := _gated(module)) is not None]
    attention_removed = any(is_removed(module, "attention") for module in block.modules())
    if not found and any(is_removed(module, "mlp") for module in block.modules()):
        return BlockView(index, block, None, attention_of(model, block), attention_removed)
    if len(found) != 1:
        linears = ", ".join(
            f"{child_name} {tuple(child.weight.shape)}"
            for child_name, child in block.named_modules()
            if isinstance(child, nn.Linear)
        )
        what = "no gated FFN" if not found else f"{len(found)} gated FFNs (a mixture of experts?)"
        raise UnsupportedModelError(
            f"{type(model).__name__}: {what} in block {name}; looked for one module with linears "
            f"{' or '.join('/'.join(names) for names in _GATED_NAMES)} of matching shapes, "
            f"found: {linears or 'no linear'}"
        )
    return BlockView(index, block, found[0], attention_of(model, block), attention_removed)


def _gated(module: nn.Module) -> GatedFFN | None:
    for gate_name, up_name, down_name in _GATED_NAMES:
        gate, up, down = (getattr(module, name, None) for name in (gate_name, up_name, down_name))
        if not (isinstance(gate, nn.Linear) and isinstance(up, nn.Linear) and isinstance(down, nn.Linear)):
            continue
        width, hidden = gate.weight.shape
        if tuple(up.weight.shape) == (width, hidden) and tuple(down.weight.shape) == (hidden, width):
            return GatedFFN(module, gate_name, up_name, down_name)
    return None


def attention_of(model: Any, block: nn.Module) -> AttentionView | None:
    """The attention of a block of ``model``; None where its projections are not recognised."""
    for module in block.modules():
        linears = [getattr(module, name, None) for name in _ATTENTION_NAMES]
        q, k, *_ = linears
        if not (all(isinstance(linear, nn.Linear) for linear in linears) and q is not None and k is not None):
            continue
        head_dim = getattr(module, "head_dim", None) or getattr(model.config, "head_dim", None)
        if not head_dim or q.out_features % head_dim or k.out_features % head_dim:
            return None
        n_heads, n_kv_heads = q.out_features // head_dim, k.out_features // head_dim
        v, o = linears[2:]
        assert v is not None
        assert o is not None
        # Value heads of another size, as in multi-head latent attention, are another structure.
        if n_heads % n_kv_heads or v.out_features != k.out_features or o.in_features != q.out_features:
            return None
        return AttentionView(module, n_heads, n_kv_heads, head_dim)
    return None
