"""A layer's tensors with zero neurons and zero heads filled up to wanted sizes: the function stays exactly the same.

A zero neuron (a zero row of gate and up, a zero column of down) adds nothing; a zero KV group attends evenly to zero
values. What pruning took away as a whole is a submodule of zeros with its norm at one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cfsp.export.folder import Layer, ModelFolder

#: Norms of a layer that may be gone with the submodule they serve.
_NORMS = {"input_layernorm.weight": "attention", "post_attention_layernorm.weight": "mlp"}


@dataclass(frozen=True)
class Wanted:
    """The sizes of a layer to be written; 0 neurons or heads: the submodule is left out, its norm too.

    biases: projections within the layer that get a bias, of zeros where the model has none ("mlp.down_proj").
    """

    width: int
    heads: int
    kv_heads: int
    biases: frozenset[str] = frozenset()


@dataclass(frozen=True)
class LayerTensor:
    """A tensor to be written: its full name, its shape, and what of it is there (None: zeros, or ones of a norm)."""

    name: str
    shape: tuple[int, ...]
    stored: str | None
    fill: float = 0.0

    def value(self, source: ModelFolder) -> Tensor:
        """The stored values in the first places of each dimension, ``fill`` in the rest."""
        if self.stored is None:
            return torch.full(self.shape, self.fill, dtype=source.dtype)
        stored = source.read(self.stored)
        if tuple(stored.shape) == self.shape:
            return stored
        filled = torch.zeros(self.shape, dtype=stored.dtype)
        filled[tuple(slice(size) for size in stored.shape)] = stored
        return filled


def layer_tensors(source: ModelFolder, index: int, wanted: Wanted) -> Iterator[LayerTensor]:
    """The tensors of layer ``index`` in the sizes of ``wanted``, which are at least those that are there."""
    hidden, head_dim = source.hidden, source.head_dim
    sizes = {
        "self_attn.q_proj": (wanted.heads * head_dim, hidden),
        "self_attn.k_proj": (wanted.kv_heads * head_dim, hidden),
        "self_attn.v_proj": (wanted.kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, wanted.heads * head_dim),
        "mlp.gate_proj": (wanted.width, hidden),
        "mlp.up_proj": (wanted.width, hidden),
        "mlp.down_proj": (hidden, wanted.width),
    }
    prefix = f"model.layers.{index}."
    there = {"attention": wanted.heads > 0, "mlp": wanted.width > 0}
    for name, shape in sizes.items():
        if not there["mlp" if name.startswith("mlp") else "attention"]:
            continue
        yield _tensor(source, f"{prefix}{name}.weight", shape)
        if name in wanted.biases or has_biases(source, name):
            yield _tensor(source, f"{prefix}{name}.bias", shape[:1])
    if there["attention"]:
        for name in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
            if any(source.has(f"model.layers.{other}.{name}") for other in range(len(source.layers))):
                yield _tensor(source, prefix + name, (head_dim,), fill=1.0)
    for name, kind in _NORMS.items():
        if there[kind]:
            yield _tensor(source, prefix + name, (hidden,), fill=1.0)


def has_biases(source: ModelFolder, projection: str) -> bool:
    """Whether the base architecture gives ``projection`` ("mlp.down_proj") a bias in every layer."""
    return any(
        source.has(f"model.layers.{index}.{projection}.bias")
        for index, layer in enumerate(source.layers)
        if projection not in layer.added_bias
    )


def other_tensors(source: ModelFolder) -> Iterator[LayerTensor]:
    """The tensors outside of the layers: embedding, final norm, LM head (not a tied one)."""
    vocabulary = int(source.config["vocab_size"])
    yield _tensor(source, "model.embed_tokens.weight", (vocabulary, source.hidden))
    yield _tensor(source, "model.norm.weight", (source.hidden,))
    if not source.tied:
        yield _tensor(source, "lm_head.weight", (vocabulary, source.hidden))


def filled_up(source: ModelFolder, wanted: list[Wanted]) -> tuple[str, ...]:
    """Sentences on what is filled up with zeros, for the user."""
    neurons = sum(max(0, w.width - layer.width) for w, layer in zip(wanted, source.layers, strict=True))
    groups = sum(max(0, w.kv_heads - layer.kv_heads) for w, layer in zip(wanted, source.layers, strict=True))
    notes = []
    if neurons:
        layers = sum(w.width > layer.width for w, layer in zip(wanted, source.layers, strict=True))
        total = sum(w.width for w in wanted)
        notes.append(f"{neurons:,} of {total:,} FFN neurons are zeros that fill up {layers} layers; they add nothing")
    if groups:
        notes.append(f"{groups} KV groups are zeros that fill up layers with fewer heads; they add nothing")
    return tuple(notes)


def up_to(width: int, multiple: int) -> int:
    """The next multiple of ``multiple`` from ``width`` on."""
    return -(-width // multiple) * multiple


def sizes(layers: tuple[Layer, ...]) -> tuple[int, int, int]:
    """(FFN neurons, query heads, KV heads): the largest of all layers."""
    most = max(layers, key=lambda layer: layer.heads)
    return max(layer.width for layer in layers), most.heads, most.kv_heads


def _tensor(source: ModelFolder, name: str, shape: tuple[int, ...], fill: float = 0.0) -> LayerTensor:
    there = source.has(name)
    return LayerTensor(name, shape, name if there else None, 0.0 if there else fill)
