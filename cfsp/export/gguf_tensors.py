"""Tensors of a GGUF file: their names and shapes in llama.cpp, and how each is read from the model folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cfsp.errors import CheckpointError
from cfsp.export.folder import ModelFolder
from cfsp.weights.gguf_rope import llama3_factors

#: These architectures pair neighbouring elements of a head in RoPE, where transformers pairs the halves.
_INTERLEAVED = ("llama", "deci")
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class GgufTensor:
    """Tensor of a GGUF file.

    Attributes:
        name: llama.cpp's name.
        shape: shape as torch has it, [rows, columns] or [n].
        read: returns the tensor, in the dtype of the folder.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Block:
    """Sizes of a block as it is written.

    Attributes:
        index: index of the layer in the folder.
        width: FFN neurons, filled up.
        heads: query heads; 0: the block has no attention tensors.
        kv_heads: KV heads; 0: the block has no attention tensors.
        zero_attention: zeros stand for an attention that the layer does not have.
        zero_ffn: zeros stand for an FFN that the layer does not have.
    """

    index: int
    width: int
    heads: int
    kv_heads: int
    zero_attention: bool = False
    zero_ffn: bool = False

    @property
    def sizes(self) -> tuple[int, int, int, bool]:
        """Return the sizes that a stock architecture needs to be equal in all blocks."""
        return self.width, self.heads, self.kv_heads, self.zero_attention


def gguf_tensors(
    source: ModelFolder,
    config: Mapping[str, Any],
    architecture: str,
    blocks: tuple[Block, ...],
    rope: Mapping[str, Any],
) -> Iterator[GgufTensor]:
    """Yield every tensor of the file, in the order in which it is written.

    Args:
        source: the model folder.
        config: config.json of the base architecture, with transformers' defaults.
        architecture: llama.cpp's name of the architecture.
        blocks: sizes of each block as it is written.
        rope: settings from :func:`cfsp.export.gguf_rope.read_rope_settings`.
    """
    hidden, vocabulary = source.hidden, int(config["vocab_size"])
    for name, stored, shape in (
        ("token_embd", "model.embed_tokens", (vocabulary, hidden)),
        ("output_norm", "model.norm", (hidden,)),
        *(() if source.tied else (("output", "lm_head", (vocabulary, hidden)),)),
    ):
        yield GgufTensor(f"{name}.weight", shape, partial(_read, source, f"{stored}.weight", shape))
    if rope["rope_type"] == "llama3":
        yield GgufTensor(
            "rope_freqs.weight", (source.head_dim // 2,), partial(llama3_factors, source.head_dim, dict(rope))
        )
    for block in blocks:
        yield from _attention(source, architecture, block)
        yield from _ffn(source, block)


def _attention(source: ModelFolder, architecture: str, block: Block) -> Iterator[GgufTensor]:
    if not block.heads:
        return
    hidden, size = source.hidden, source.head_dim
    start, stored_here = f"blk.{block.index}", not block.zero_attention
    yield _norm(source, f"{start}.attn_norm", f"model.layers.{block.index}.input_layernorm", hidden, stored_here)
    heads = {"self_attn.q_proj": block.heads, "self_attn.k_proj": block.kv_heads, "self_attn.v_proj": block.kv_heads}
    permuted = heads if architecture in _INTERLEAVED else {}
    parts = []
    for name, n in heads.items():
        turned = n if name in permuted and name != "self_attn.v_proj" else 0
        parts.append(_linear(source, block, name, (n * size, hidden), stored_here=stored_here, heads=turned))
    if architecture == "openelm":
        weights = [next(part) for part in parts]
        rows = sum(weight.shape[0] for weight in weights)
        yield GgufTensor(f"{start}.attn_qkv.weight", (rows, hidden), partial(_joined, weights))
    else:
        for part in parts:
            yield from part
    yield from _linear(source, block, "self_attn.o_proj", (hidden, block.heads * size), stored_here=stored_here)
    if source.family == "qwen3":
        for norm in ("q_norm", "k_norm"):
            stored_name = f"model.layers.{block.index}.self_attn.{norm}"
            yield _norm(source, f"{start}.attn_{norm}", stored_name, size, stored_here)


def _ffn(source: ModelFolder, block: Block) -> Iterator[GgufTensor]:
    hidden, stored_here = source.hidden, not block.zero_ffn
    stored_name = f"model.layers.{block.index}.post_attention_layernorm"
    yield _norm(source, f"blk.{block.index}.ffn_norm", stored_name, hidden, stored_here)
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        yield from _linear(source, block, name, (block.width, hidden), stored_here=stored_here)
    yield from _linear(source, block, "mlp.down_proj", (hidden, block.width), stored_here=stored_here)


def _norm(source: ModelFolder, name: str, stored_name: str, size: int, stored_here: bool) -> GgufTensor:
    """Return the norm of a submodule; ones where zeros stand for the submodule, which they reach without effect."""
    read = partial(_read, source, f"{stored_name}.weight", (size,)) if stored_here else partial(torch.ones, size)
    return GgufTensor(f"{name}.weight", (size,), read)


def _linear(
    source: ModelFolder, block: Block, name: str, shape: tuple[int, int], *, stored_here: bool, heads: int = 0
) -> Iterator[GgufTensor]:
    """Yield the weight of a projection and, where the folder has one, its bias.

    Args:
        source: the model folder.
        block: sizes of the block as it is written.
        name: name of the projection within the layer, e.g. "mlp.down_proj".
        shape: shape of the weight as it is written.
        stored_here: whether the layer has the submodule; otherwise zeros are written.
        heads: number of heads whose rows are reordered for llama.cpp's RoPE; 0: none.
    """
    written_name, stored_name = f"blk.{block.index}.{_NAMES[name]}", f"model.layers.{block.index}.{name}"
    if not stored_here:
        yield GgufTensor(f"{written_name}.weight", shape, partial(torch.zeros, shape))
        return
    width = source.layers[block.index].width
    stored_shape = (
        (width if name in ("mlp.gate_proj", "mlp.up_proj") else shape[0]),
        (width if name == "mlp.down_proj" else shape[1]),
    )
    yield GgufTensor(
        f"{written_name}.weight", shape, partial(_filled, source, f"{stored_name}.weight", stored_shape, shape, heads)
    )
    if source.has(f"{stored_name}.bias"):
        read = partial(_filled, source, f"{stored_name}.bias", stored_shape[:1], shape[:1], heads)
        yield GgufTensor(f"{written_name}.bias", shape[:1], read)


def _read(source: ModelFolder, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = source.read(name)
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{source.folder}: {name} is {tuple(tensor.shape)}, its config.json says {shape}; save the model again"
        )
    return tensor


def _filled(
    source: ModelFolder, name: str, stored_shape: tuple[int, ...], shape: tuple[int, ...], heads: int = 0
) -> Tensor:
    """Read a tensor of the folder in its stored shape and fill it up with zeros at the ends."""
    tensor = _read(source, name, stored_shape)
    if stored_shape != shape:
        margins = [(0, target - stored) for target, stored in zip(shape, stored_shape, strict=True)]
        tensor = pad(tensor, [n for pair in reversed(margins) for n in pair])
    return interleaved(tensor, heads) if heads else tensor


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Reorder rows [heads * size, ...] so that the two halves of each head, which RoPE pairs, alternate."""
    rest = tensor.shape[1:]
    return tensor.reshape(heads, 2, -1, *rest).transpose(1, 2).reshape(-1, *rest)


def _joined(tensors: list[GgufTensor]) -> Tensor:
    return torch.cat([tensor.read() for tensor in tensors])
