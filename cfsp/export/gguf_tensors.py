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
from cfsp.export.gguf_rope import llama3_factors

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
    """shape: as torch has it, [rows, columns] or [n]; read: gives the tensor, in the dtype of the folder."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Block:
    """A block as it is written; heads and kv_heads 0: no attention tensors.

    index: of the folder's layer. zero_attention, zero_ffn: zeros stand where the layer has none.
    """

    index: int
    width: int
    heads: int
    kv_heads: int
    zero_attention: bool = False
    zero_ffn: bool = False

    @property
    def sizes(self) -> tuple[int, int, int, bool]:
        """What a stock architecture needs to be alike in all blocks."""
        return self.width, self.heads, self.kv_heads, self.zero_attention


def gguf_tensors(
    source: ModelFolder,
    config: Mapping[str, Any],
    architecture: str,
    blocks: tuple[Block, ...],
    rope: Mapping[str, Any],
) -> Iterator[GgufTensor]:
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
    start, there = f"blk.{block.index}", not block.zero_attention
    yield _norm(source, f"{start}.attn_norm", f"model.layers.{block.index}.input_layernorm", hidden, there)
    heads = {"self_attn.q_proj": block.heads, "self_attn.k_proj": block.kv_heads, "self_attn.v_proj": block.kv_heads}
    permuted = heads if architecture in _INTERLEAVED else {}
    parts = []
    for name, n in heads.items():
        turned = n if name in permuted and name != "self_attn.v_proj" else 0
        parts.append(_linear(source, block, name, (n * size, hidden), there=there, heads=turned))
    if architecture == "openelm":
        weights = [next(part) for part in parts]
        rows = sum(weight.shape[0] for weight in weights)
        yield GgufTensor(f"{start}.attn_qkv.weight", (rows, hidden), partial(_joined, weights))
    else:
        for part in parts:
            yield from part
    yield from _linear(source, block, "self_attn.o_proj", (hidden, block.heads * size), there=there)
    if source.family == "qwen3":
        for norm in ("q_norm", "k_norm"):
            stored = f"model.layers.{block.index}.self_attn.{norm}"
            yield _norm(source, f"{start}.attn_{norm}", stored, size, there)


def _ffn(source: ModelFolder, block: Block) -> Iterator[GgufTensor]:
    hidden, there = source.hidden, not block.zero_ffn
    stored = f"model.layers.{block.index}.post_attention_layernorm"
    yield _norm(source, f"blk.{block.index}.ffn_norm", stored, hidden, there)
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        yield from _linear(source, block, name, (block.width, hidden), there=there)
    yield from _linear(source, block, "mlp.down_proj", (hidden, block.width), there=there)


def _norm(source: ModelFolder, name: str, stored: str, size: int, there: bool) -> GgufTensor:
    """The norm before zeros counts for nothing."""
    read = partial(_read, source, f"{stored}.weight", (size,)) if there else partial(torch.ones, size)
    return GgufTensor(f"{name}.weight", (size,), read)


def _linear(
    source: ModelFolder, block: Block, name: str, shape: tuple[int, int], *, there: bool, heads: int = 0
) -> Iterator[GgufTensor]:
    """Weight and, where there is one, bias; heads: rows are brought into the order that llama.cpp's RoPE asks for."""
    written, stored = f"blk.{block.index}.{_NAMES[name]}", f"model.layers.{block.index}.{name}"
    if not there:
        yield GgufTensor(f"{written}.weight", shape, partial(torch.zeros, shape))
        return
    width = source.layers[block.index].width
    found = (
        (width if name in ("mlp.gate_proj", "mlp.up_proj") else shape[0]),
        (width if name == "mlp.down_proj" else shape[1]),
    )
    yield GgufTensor(f"{written}.weight", shape, partial(_filled, source, f"{stored}.weight", found, shape, heads))
    if source.has(f"{stored}.bias"):
        read = partial(_filled, source, f"{stored}.bias", found[:1], shape[:1], heads)
        yield GgufTensor(f"{written}.bias", shape[:1], read)


def _read(source: ModelFolder, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = source.read(name)
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{source.folder}: {name} is {tuple(tensor.shape)}, its config.json says {shape}; save the model again"
        )
    return tensor


def _filled(source: ModelFolder, name: str, found: tuple[int, ...], shape: tuple[int, ...], heads: int = 0) -> Tensor:
    """A tensor of the folder, filled up with zeros at its ends."""
    tensor = _read(source, name, found)
    if found != shape:
        missing = [(0, wanted - there) for wanted, there in zip(shape, found, strict=True)]
        tensor = pad(tensor, [n for pair in reversed(missing) for n in pair])
    return interleaved(tensor, heads) if heads else tensor


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows [heads * size, ...] so that the halves of each head, which RoPE pairs, alternate."""
    rest = tensor.shape[1:]
    return tensor.reshape(heads, 2, -1, *rest).transpose(1, 2).reshape(-1, *rest)


def _joined(tensors: list[GgufTensor]) -> Tensor:
    return torch.cat([tensor.read() for tensor in tensors])
