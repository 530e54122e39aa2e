"""Layout of a model in llama.cpp: its architecture there, the metadata, and every tensor with its source.

Among llama.cpp's architectures with LLaMA's blocks only ``deci`` and ``openelm`` give each block its own sizes. The
stock ones (``llama``, ``qwen2``, ``qwen3``) take the sizes of the first block for all. Zeros that add nothing stand for
a submodule that the architecture cannot leave out: an FFN of one chunk of neurons, or one attention head.

The gguf package maps tensor names and writes the file, but its converter (``convert_hf_to_gguf.py``) is not part of the
package. The choice of the architecture, the filled-up sizes and the order of rows are therefore decided here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfsp.errors import CheckpointError, UnsupportedModelError
from cfsp.export.folder import ModelFolder, check_tensors_stored
from cfsp.export.gguf_rope import ROPE_TYPES, read_rope_settings
from cfsp.export.gguf_tensors import Block, GgufTensor, gguf_tensors

#: Q8_0 holds only rows whose length is a multiple of this, and llama.cpp is several times slower on other lengths.
CHUNK = 32
_STOCK = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LINEARS = (*_QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
#: Architecture of llama.cpp -> the projections that may have a bias in it.
_BIASES: dict[str, tuple[str, ...]] = {
    "llama": _LINEARS, "deci": _LINEARS, "qwen2": _QKV, "qwen3": _QKV, "openelm": (),
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Architecture, metadata and tensors of a GGUF file.

    Attributes:
        architecture: llama.cpp's name of the architecture.
        values: metadata by key, without the architecture's prefix.
        tensors: tensors in the order in which they are written.
        notes: sentences for the user.
    """

    architecture: str
    values: Mapping[str, int | float | str | list[int]]
    tensors: tuple[GgufTensor, ...]
    notes: tuple[str, ...] = field(default=())


def lay_out(source: ModelFolder, config: Mapping[str, Any], multiple: int = CHUNK) -> Layout:
    """Decide how llama.cpp holds the model; no weight is read.

    Args:
        source: the model folder.
        config: config.json of the base architecture, with transformers' defaults where config.json says nothing.
        multiple: multiple to which FFN widths are filled up.

    Raises:
        UnsupportedModelError: llama.cpp cannot hold the model; names the block or the key.
        CheckpointError: a tensor is missing.
    """
    check_tensors_stored(source)
    if config.get("hidden_act") != "silu":
        raise UnsupportedModelError(
            f"{source.folder}: hidden_act={config.get('hidden_act')} cannot be written in GGUF, only silu can; use "
            "format=hf"
        )
    rope = read_rope_settings(source, config)
    architecture = _architecture(source, rope, multiple)
    blocks = tuple(_block(source, index, architecture, multiple) for index in range(len(source.layers)))
    _check_biases(source, architecture)
    tensors = tuple(gguf_tensors(source, config, architecture, blocks, rope))
    return Layout(
        architecture,
        _values(source, config, architecture, blocks, rope),
        tensors,
        tuple(_notes(source, config, architecture, blocks, multiple)),
    )


# Architecture


def _architecture(source: ModelFolder, rope: Mapping[str, Any], multiple: int) -> str:
    """Return the family's own architecture where all blocks are equal, otherwise one with sizes for each block."""
    stock = _STOCK[source.family]
    blocks = [_block(source, index, stock, multiple) for index in range(len(source.layers))]
    odd = next((block.index for block in blocks if block.sizes != blocks[0].sizes), None)
    holds = rope["rope_type"] in ROPE_TYPES[stock] and all(
        name in _BIASES[stock] for block in blocks for name in _biases(source, block.index)
    )
    # llama.cpp's qwen2 gives all heads together the size of the hidden state.
    square = stock != "qwen2" or blocks[0].heads * source.head_dim == source.hidden
    if odd is None and holds and square:
        return stock
    if source.family != "qwen3":
        return "deci"
    if odd is None:
        return stock  # it cannot hold a bias, which _check_biases reports
    if not source.tied:
        raise UnsupportedModelError(
            f"{source.folder}: block {odd} differs from block 0, and llama.cpp has no architecture for a qwen3 model "
            "with unequal blocks whose LM head is not the embedding; export format=padded first, and that folder as "
            "gguf"
        )
    return "openelm"


def _block(source: ModelFolder, index: int, architecture: str, multiple: int) -> Block:
    layer = source.layers[index]
    # deci reads the size of a head from block 0, and openelm has no blocks without attention.
    zero_attention = not layer.heads and (index == 0 or architecture != "deci")
    return Block(
        index,
        width=max(1, math.ceil(layer.width / multiple)) * multiple,
        heads=1 if zero_attention else layer.heads,
        kv_heads=1 if zero_attention else layer.kv_heads,
        zero_attention=zero_attention,
        # deci drops the output of the attention in a block with n_ff=0.
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


# Metadata


def _window(config: Mapping[str, Any]) -> int | None:
    """Return the sliding window of the model; None where no layer has one."""
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
        # llama.cpp's architectures for these families have no sliding window; both agree on texts that fit into it.
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


# Notes for the user


def _notes(
    source: ModelFolder, config: Mapping[str, Any], architecture: str, blocks: tuple[Block, ...], multiple: int
) -> Iterator[str]:
    if architecture not in _STOCK.values():
        yield f"llama.cpp runs it as {architecture}, the architecture that gives each block its own sizes."
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
        yield f"Exact for texts of up to {window} tokens, the sliding window, which llama.cpp does not apply."


def _listed(numbers: list[int]) -> str:
    return f"block{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def model_config(source: ModelFolder) -> dict[str, Any]:
    """Return config.json of the base architecture as transformers reads it.

    Defaults and both spellings of RoPE are included.

    Raises:
        CheckpointError: transformers does not take it.
    """
    from transformers import AutoConfig

    settings = {key: value for key, value in source.config.items() if key not in ("model_type", "transformers_version")}
    try:
        config: dict[str, Any] = AutoConfig.for_model(source.family, **settings).to_dict()
    except Exception as error:
        where = Path(source.folder) / "config.json"
        named = re.search(r"field '(\w+)'", str(error))
        reason = f"{named[1]}={settings.get(named[1])!s:.60}" if named else " ".join(str(error).split())[:200]
        raise CheckpointError(f"{where}: transformers does not take it ({reason}); save the model again") from error
    return {**config, "model_type": source.family}
