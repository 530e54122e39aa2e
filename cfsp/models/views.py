"""What the pruners see of an architecture: blocks, their gated FFN, their attention. Resolved by structure.

A decoder is recognised by the linears that are there and their attribute names, never by a model's or a
repository's name. :mod:`cfsp.pruning.probe` then checks each view numerically before anything is pruned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    """Separate q, k, v, o projections; heads are derived from the real shapes."""

    module: nn.Module
    n_heads: int
    n_kv_heads: int
    head_dim: int

    @property
    def o_proj(self) -> nn.Linear:
        return self.module.o_proj  # type: ignore[return-value]


@dataclass(frozen=True)
class BlockView:
    """One decoder block. ``attention`` is None where its projections were not recognised."""

    index: int
    module: nn.Module
    ffn: GatedFFN
    attention: AttentionView | None


@dataclass(frozen=True)
class DecoderView:
    """A causal language model as a list of blocks. ``decoder`` is the model without its LM head."""

    model: Any
    decoder: Any
    blocks: tuple[BlockView, ...]

    @property
    def widths(self) -> list[int]:
        return [block.ffn.width for block in self.blocks]

    @property
    def neuron_parameters(self) -> list[int]:
        return [block.ffn.neuron_parameters for block in self.blocks]

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
    views = tuple(_block(model, f"{name}.{index}", index, block) for index, block in enumerate(blocks))
    return DecoderView(model, decoder, views)


def _looks_like_block(module: nn.Module) -> bool:
    return sum(isinstance(child, nn.Linear) for child in module.modules()) >= 2


def _block(model: Any, name: str, index: int, block: nn.Module) -> BlockView:
    found = [ffn for module in block.modules() if (ffn := _gated(module)) is not None]
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
    return BlockView(index, block, found[0], _attention(model, block))


def _gated(module: nn.Module) -> GatedFFN | None:
    for gate_name, up_name, down_name in _GATED_NAMES:
        gate, up, down = (getattr(module, name, None) for name in (gate_name, up_name, down_name))
        if not (isinstance(gate, nn.Linear) and isinstance(up, nn.Linear) and isinstance(down, nn.Linear)):
            continue
        width, hidden = gate.weight.shape
        if tuple(up.weight.shape) == (width, hidden) and tuple(down.weight.shape) == (hidden, width):
            return GatedFFN(module, gate_name, up_name, down_name)
    return None


def _attention(model: Any, block: nn.Module) -> AttentionView | None:
    for module in block.modules():
        linears = [getattr(module, name, None) for name in _ATTENTION_NAMES]
        q, k, *_ = linears
        if not (all(isinstance(linear, nn.Linear) for linear in linears) and q is not None and k is not None):
            continue
        head_dim = getattr(module, "head_dim", None) or getattr(model.config, "head_dim", None)
        if not head_dim or q.out_features % head_dim or k.out_features % head_dim:
            return None
        return AttentionView(module, q.out_features // head_dim, k.out_features // head_dim, head_dim)
    return None
