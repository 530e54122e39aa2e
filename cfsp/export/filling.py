"""A layer's tensors with zero neurons and zero heads filled up to wanted sizes: the function stays exactly the same.

A zero neuron (a zero row of gate and up, a zero column of down) adds nothing; a zero KV group attends evenly to zero
values. What pruning took away as a whole is a submodule of zeros with its norm at one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cfsp.export.folder import Layer, ModelFolder, projections


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
    """The tensors of layer ``index`` in the sizes of ``wanted``, which are at least those that are there.

    Zeros (a norm: ones) stand for what the layer says it does not have, and for nothing else.
    """
    layer, prefix = source.layers[index], f"model.layers.{index}."
    there = {"self_attn": layer.heads > 0, "mlp": layer.width > 0}
    for name, shape in projections(source, wanted.width, wanted.heads, wanted.kv_heads).items():
        stored = there[name.partition(".")[0]]
        yield _tensor(f"{prefix}{name}.weight", shape, stored=stored)
        own = name in source.biased
        if own or name in wanted.biases:
            yield _tensor(f"{prefix}{name}.bias", shape[:1], stored=stored and (own or name in layer.added_bias))
    if wanted.heads and source.family == "qwen3":
        for name in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
            yield _tensor(prefix + name, (source.head_dim,), stored=there["self_attn"], fill=1.0)
    for norm, submodule, n in (
        ("input_layernorm", "self_attn", wanted.heads),
        ("post_attention_layernorm", "mlp", wanted.width),
    ):
        if n:
            yield _tensor(f"{prefix}{norm}.weight", (source.hidden,), stored=there[submodule], fill=1.0)


def other_tensors(source: ModelFolder) -> Iterator[LayerTensor]:
    """The tensors outside of the layers: embedding, final norm, LM head (not a tied one)."""
    vocabulary = int(source.config["vocab_size"])
    yield _tensor("model.embed_tokens.weight", (vocabulary, source.hidden))
    yield _tensor("model.norm.weight", (source.hidden,))
    if not source.tied:
        yield _tensor("lm_head.weight", (vocabulary, source.hidden))


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


def _tensor(name: str, shape: tuple[int, ...], *, stored: bool = True, fill: float = 0.0) -> LayerTensor:
    return LayerTensor(name, shape, name if stored else None, 0.0 if stored else fill)
