"""Filling up the tensors of a layer with zero neurons and zero heads; the function of the model stays exactly the same.

A zero neuron (a zero row of gate and up, a zero column of down) adds nothing, and a zero KV group attends evenly to
values of zero. A submodule that pruning removed becomes one of zeros whose norm is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cfsp.export.folder import Layer, ModelFolder, projections


@dataclass(frozen=True)
class TargetSizes:
    """Sizes of a layer as it is written; with 0 neurons or heads the submodule and its norm are left out.

    Attributes:
        width: FFN neurons.
        heads: query heads.
        kv_heads: KV heads.
        biases: projections within the layer ("mlp.down_proj") that get a bias, zero where the model has none.
    """

    width: int
    heads: int
    kv_heads: int
    biases: frozenset[str] = frozenset()


@dataclass(frozen=True)
class LayerTensor:
    """Tensor to be written.

    Attributes:
        name: full name.
        shape: shape as it is written, at least as large as the stored one.
        stored: name of the stored tensor; None: there is none.
        fill: value of the whole tensor where nothing is stored: 0, or 1 for a norm.
    """

    name: str
    shape: tuple[int, ...]
    stored: str | None
    fill: float = 0.0

    def value(self, source: ModelFolder) -> Tensor:
        """Return the tensor: stored values at the start of each dimension, zeros after them."""
        if self.stored is None:
            return torch.full(self.shape, self.fill, dtype=source.dtype)
        stored = source.read(self.stored)
        if tuple(stored.shape) == self.shape:
            return stored
        filled = torch.zeros(self.shape, dtype=stored.dtype)
        filled[tuple(slice(size) for size in stored.shape)] = stored
        return filled


def layer_tensors(source: ModelFolder, index: int, target: TargetSizes) -> Iterator[LayerTensor]:
    """Yield the tensors of layer ``index`` in the sizes of ``target``, which are at least the stored ones.

    Zeros (ones for a norm) stand only for submodules and biases that the layer says it does not have.
    """
    layer, prefix = source.layers[index], f"model.layers.{index}."
    has_submodule = {"self_attn": layer.heads > 0, "mlp": layer.width > 0}
    for name, shape in projections(source, target.width, target.heads, target.kv_heads).items():
        stored = has_submodule[name.partition(".")[0]]
        yield _tensor(f"{prefix}{name}.weight", shape, stored=stored)
        always_biased = name in source.biased
        if always_biased or name in target.biases:
            yield _tensor(
                f"{prefix}{name}.bias", shape[:1], stored=stored and (always_biased or name in layer.added_bias)
            )
    if target.heads and source.family == "qwen3":
        for name in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
            yield _tensor(prefix + name, (source.head_dim,), stored=has_submodule["self_attn"], fill=1.0)
    for norm, submodule, n in (
        ("input_layernorm", "self_attn", target.heads),
        ("post_attention_layernorm", "mlp", target.width),
    ):
        if n:
            yield _tensor(f"{prefix}{norm}.weight", (source.hidden,), stored=has_submodule[submodule], fill=1.0)


def other_tensors(source: ModelFolder) -> Iterator[LayerTensor]:
    """Yield the tensors outside of the layers: embedding, final norm and LM head, unless the head is tied."""
    vocabulary = int(source.config["vocab_size"])
    yield _tensor("model.embed_tokens.weight", (vocabulary, source.hidden))
    yield _tensor("model.norm.weight", (source.hidden,))
    if not source.tied:
        yield _tensor("lm_head.weight", (vocabulary, source.hidden))


def describe_padding(source: ModelFolder, targets: list[TargetSizes]) -> tuple[str, ...]:
    """Return notes for the user: one sentence each on the neurons and the KV groups that are zeros."""
    neurons = sum(max(0, w.width - layer.width) for w, layer in zip(targets, source.layers, strict=True))
    groups = sum(max(0, w.kv_heads - layer.kv_heads) for w, layer in zip(targets, source.layers, strict=True))
    notes = []
    if neurons:
        layers = sum(w.width > layer.width for w, layer in zip(targets, source.layers, strict=True))
        total = sum(w.width for w in targets)
        notes.append(f"{neurons:,} of {total:,} FFN neurons are zeros that fill up {layers} layers; they add nothing")
    if groups:
        notes.append(f"{groups} KV groups are zeros that fill up layers with fewer heads; they add nothing")
    return tuple(notes)


def round_up(width: int, multiple: int) -> int:
    """Return ``width`` rounded up to a multiple of ``multiple``."""
    return -(-width // multiple) * multiple


def sizes(layers: tuple[Layer, ...]) -> tuple[int, int, int]:
    """Return the largest (FFN neurons, query heads, KV heads) of all layers."""
    most = max(layers, key=lambda layer: layer.heads)
    return max(layer.width for layer in layers), most.heads, most.kv_heads


def _tensor(name: str, shape: tuple[int, ...], *, stored: bool = True, fill: float = 0.0) -> LayerTensor:
    return LayerTensor(name, shape, name if stored else None, 0.0 if stored else fill)
