"""How llama.cpp holds a model: its architecture there, the metadata, and every tensor with where it comes from.

Of llama.cpp's architectures with LLaMA's blocks only ``deci`` and ``openelm`` give each block sizes of its own; the
stock ones (``llama``, ``qwen2``, ``qwen3``) take the first block's for all. What neither can leave out stays as zeros
that add nothing: an FFN of one chunk of neurons, one attention head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cfsp.errors import CheckpointError, UnsupportedModelError
from cfsp.export.folder import ModelFolder, check_there

#: Q8_0 holds rows of a multiple of it, and llama.cpp computes others at a fraction of its speed.
CHUNK = 32
_STOCK = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
#: They pair neighbouring elements of a head in RoPE, where transformers pairs the halves.
_INTERLEAVED = ("llama", "deci")
_OF_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LINEARS = (*_OF_ATTENTION, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
#: Which of the projections may have a bias there.
_BIASES: dict[str, tuple[str, ...]] = {
    "llama": _LINEARS, "deci": _LINEARS, "qwen2": _OF_ATTENTION, "qwen3": _OF_ATTENTION, "openelm": (),
}  # fmt: skip
#: Which ways to scale RoPE are known there. llama3: a tensor of factors, that the others do not read.
_EVERYWHERE = ("default", "linear", "yarn")
_SCALED = {
    "llama": (*_EVERYWHERE, "llama3"),
    "deci": (*_EVERYWHERE, "llama3"),
    "qwen2": _EVERYWHERE,
    "qwen3": _EVERYWHERE,
    "openelm": _EVERYWHERE,
}
#: Settings of YaRN that programs on llama.cpp do not take from the file, with the values that they assume.
_YARN_ASSUMED = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": None, "mscale": None}
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


@dataclass(frozen=True)
class Layout:
    """values: metadata without the architecture's prefix; notes: sentences for the user."""

    architecture: str
    values: Mapping[str, int | float | str | list[int]]
    tensors: tuple[GgufTensor, ...]
    notes: tuple[str, ...] = field(default=())


def lay_out(source: ModelFolder, config: Mapping[str, Any], multiple: int = CHUNK) -> Layout:
    """
    Args:
        config: the base architecture's, with transformers' defaults where config.json says nothing.
        multiple: FFN widths are filled up to multiples of it.

    Raises:
        UnsupportedModelError: llama.cpp cannot hold the model; names the block or the key.
        CheckpointError: a tensor is missing.
    """
    check_there(source)
    if config.get("hidden_act") != "silu":
        raise UnsupportedModelError(
            f"{source.folder}: hidden_act={config.get('hidden_act')} has no form in GGUF, only silu has; use format=hf"
        )
    rope = _rope(source, config)
    architecture = _architecture(source, rope, multiple)
    blocks = tuple(_block(source, index, architecture, multiple) for index in range(len(source.layers)))
    _check_biases(source, architecture)
    tensors = tuple(_tensors(source, config, architecture, blocks, rope))
    return Layout(
        architecture,
        _values(source, config, architecture, blocks, rope),
        tensors,
        tuple(_notes(source, config, architecture, blocks, multiple)),
    )


# Which architecture


def _architecture(source: ModelFolder, rope: Mapping[str, Any], multiple: int) -> str:
    """The family's own where all blocks are alike, else one that gives each block its own sizes."""
    stock = _STOCK[source.family]
    blocks = [_block(source, index, stock, multiple) for index in range(len(source.layers))]
    odd = next((block.index for block in blocks if block.sizes != blocks[0].sizes), None)
    holds = rope["rope_type"] in _SCALED[stock] and all(
        name in _BIASES[stock] for block in blocks for name in _biases(source, block.index)
    )
    # llama.cpp's qwen2 gives all heads together the size of the hidden state.
    square = stock != "qwen2" or blocks[0].heads * source.head_dim == source.hidden
    if odd is None and holds and square:
        return stock
    if source.family != "qwen3":
        return "deci"
    if odd is None:
        return stock  # which cannot hold a bias; the check of biases says so
    if not source.tied:
        raise UnsupportedModelError(
            f"{source.folder}: block {odd} differs from block 0, and llama.cpp has no form for a qwen3 model with "
            "unequal blocks whose LM head is not the embedding; export format=padded first, and that folder as gguf"
        )
    return "openelm"


def _block(source: ModelFolder, index: int, architecture: str, multiple: int) -> Block:
    layer = source.layers[index]
    # deci takes the size of a head from block 0; openelm knows no block without attention.
    zero_attention = not layer.heads and (index == 0 or architecture != "deci")
    return Block(
        index,
        width=max(1, math.ceil(layer.width / multiple)) * multiple,
        heads=1 if zero_attention else layer.heads,
        kv_heads=1 if zero_attention else layer.kv_heads,
        zero_attention=zero_attention,
        # Of a block with n_ff=0, deci loses the attention's output.
        zero_ffn=not layer.width,
    )


# Biases


def _biases(source: ModelFolder, index: int) -> list[str]:
    return [name for name in _LINEARS if source.has(f"model.layers.{index}.{name}.bias")]


def _check_biases(source: ModelFolder, architecture: str) -> None:
    for index in range(len(source.layers)):
        for name in _biases(source, index):
            if name not in _BIASES[architecture]:
                raise UnsupportedModelError(
                    f"{source.folder}: block {index} has a bias on {name}, which llama.cpp's {architecture}, the only "
                    f"form for this {source.family} model, cannot hold; use format=hf, or pruner.compensation=none"
                )


# RoPE


def _rope(source: ModelFolder, config: Mapping[str, Any]) -> dict[str, Any]:
    rope = dict(config.get("rope_parameters") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    kind, part = rope["rope_type"], rope.get("partial_rotary_factor", 1.0)
    known = {one for ways in _SCALED.values() for one in ways}
    if kind not in known or (source.family == "qwen3" and kind not in _SCALED["qwen3"]):
        raise UnsupportedModelError(
            f"{source.folder}: RoPE of rope_type={kind} cannot be written for {source.family}; GGUF takes "
            f"{', '.join(sorted(known))} (qwen3: {', '.join(_SCALED['qwen3'])}); use format=hf"
        )
    for key, assumed in _YARN_ASSUMED.items() if kind == "yarn" else ():
        if rope.get(key) not in (None, assumed):
            raise UnsupportedModelError(
                f"{source.folder}: YaRN with {key}={rope[key]} has no form in GGUF, only {assumed} has; use format=hf"
            )
    if part != 1.0:
        raise UnsupportedModelError(
            f"{source.folder}: partial_rotary_factor={part} has no form in GGUF, where whole heads turn; use format=hf"
        )
    return rope


def _llama3_factors(head_dim: int, rope: Mapping[str, Any]) -> Tensor:
    """What llama.cpp divides each frequency by, [head_dim / 2]."""
    plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    wavelength = 2 * math.pi / plain
    low, high, original = (
        float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / float(rope["factor"]) + smooth)).float()


# Metadata


def _window(config: Mapping[str, Any]) -> int | None:
    """The sliding window, where a layer has one."""
    window = config.get("sliding_window")
    types = config.get("layer_types")
    slides = "sliding_attention" in types if types else config["model_type"] == "mistral"
    return int(window) if window and slides else None


def _values(
    source: ModelFolder,
    config: Mapping[str, Any],
    architecture: str,
    blocks: tuple[Block, ...],
    rope: Mapping[str, Any],
) -> dict[str, int | float | str | list[int]]:
    positions = int(config["max_position_embeddings"])
    values: dict[str, int | float | str | list[int]] = {
        "vocab_size": int(config["vocab_size"]),
        # llama.cpp's forms of these families have no window: within it, both compute the same.
        "context_length": min(positions, _window(config) or positions),
        "embedding_length": source.hidden,
        "block_count": len(blocks),
        "feed_forward_length": [block.width for block in blocks],
        "attention.head_count": [block.heads for block in blocks],
        "attention.head_count_kv": [block.kv_heads for block in blocks],
        "attention.key_length": source.head_dim,
        "attention.value_length": source.head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": source.head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if architecture in _STOCK.values():
        values |= {key: value[0] for key, value in values.items() if isinstance(value, list)}
    if rope["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        values["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    return values


# Tensors


def _tensors(
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
            "rope_freqs.weight", (source.head_dim // 2,), partial(_llama3_factors, source.head_dim, dict(rope))
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


# What the user should know


def _notes(
    source: ModelFolder, config: Mapping[str, Any], architecture: str, blocks: tuple[Block, ...], multiple: int
) -> Iterator[str]:
    if architecture not in _STOCK.values():
        yield f"llama.cpp runs it as {architecture}, the form that gives each block sizes of its own."
    filled = [block for block in blocks if not block.zero_ffn and block.width != source.layers[block.index].width]
    if filled:
        added = sum(block.width - source.layers[block.index].width for block in filled)
        yield (
            f"{added} zero neurons in {len(filled)} of {len(blocks)} blocks fill the FFN widths up to multiples of "
            f"{multiple}; they change no output."
        )
    empty = [block.index for block in blocks if block.zero_ffn]
    if empty:
        yield f"An FFN of {multiple} zero neurons stands where there is none, in {_listed(empty)}."
    stubs = [block.index for block in blocks if block.zero_attention]
    if stubs:
        yield f"One attention head of zeros stands where there is no attention, in {_listed(stubs)}."
    window = _window(config)
    if window and window < int(config["max_position_embeddings"]):
        yield f"Exact for texts of up to {window} tokens, the sliding window, which llama.cpp does not slide."


def _listed(numbers: list[int]) -> str:
    return f"block{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def model_config(source: ModelFolder) -> dict[str, Any]:
    """config.json of the base architecture as transformers reads it, defaults and both spellings of RoPE included.

    Raises:
        CheckpointError: transformers does not take it.
    """
    from transformers import AutoConfig

    given = {key: value for key, value in source.config.items() if key not in ("model_type", "transformers_version")}
    try:
        found: dict[str, Any] = AutoConfig.for_model(source.family, **given).to_dict()
    except Exception as error:
        where = Path(source.folder) / "config.json"
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{where}: transformers does not take it ({said}); save the model again") from error
    return {**found, "model_type": source.family}
