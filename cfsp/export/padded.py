"""Padded export: a plain folder of the base architecture in which zeros fill up every layer to the widest one.

It loads wherever the base architecture does, without remote code, and gives up part of the speed that unequal widths
gain. An added bias becomes a bias of the stock class, zero in the layers that have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cfsp.errors import UnsupportedModelError
from cfsp.export.filling import TargetSizes, describe_padding, layer_tensors, other_tensors, round_up, sizes
from cfsp.export.folder import ModelFolder, check_tensors_stored
from cfsp.export.plain_folder import write_plain_folder
from cfsp.export.result import Exported

#: Projection with an added bias -> family -> the key of config.json that gives all layers such biases, and the
#: projections that then have one.
_BIAS_KEYS: Mapping[str, Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "mlp.down_proj": {"llama": ("mlp_bias", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))},
    "self_attn.o_proj": {
        family: ("attention_bias", tuple(f"self_attn.{name}_proj" for name in "qkvo")) for family in ("llama", "qwen3")
    },
}


def check(source: ModelFolder) -> None:
    """Check from headers alone that the base architecture can hold the model.

    Raises:
        UnsupportedModelError: the base architecture has no place for an added bias; names the layer.
        CheckpointError: the folder is not whole.
    """
    check_tensors_stored(source)
    for index, layer in enumerate(source.layers):
        for name in layer.added_bias:
            if not holds_bias(source, name):
                raise UnsupportedModelError(
                    f"{source.folder}: layer {index} has a bias at {name} (pruner.compensation=bias), for which "
                    f"{source.family} has no place; use format=hf, or prune with pruner.compensation=none"
                )


def holds_bias(source: ModelFolder, name: str) -> bool:
    """Return whether the base architecture has a place for a bias that compensation adds to the projection ``name``."""
    return _family(source, biased=True) in _BIAS_KEYS[name]


def export(source: ModelFolder, to: Path, *, dtype: torch.dtype | None = None, multiple: int = 1) -> Exported:
    """Write the model to the folder ``to``, all or nothing.

    Args:
        source: the model folder.
        to: folder to write; one that cfsp wrote earlier is replaced.
        dtype: dtype of the tensors; None: as they are stored.
        multiple: multiple to which the common FFN width is filled up.

    Raises:
        UnsupportedModelError: as :func:`check`.
        CheckpointError: the folder is not whole, or ``to`` cannot be written.
    """
    check(source)
    width, heads, kv_heads = sizes(source.layers)
    width = round_up(max(width, 1), multiple)
    if source.hidden % heads:  # LLaMA's configuration refuses such head counts
        heads, kv_heads = (int(source.config[key]) for key in ("num_attention_heads", "num_key_value_heads"))
    family = _family(source, biased=any(layer.added_bias for layer in source.layers))
    config: dict[str, Any] = {
        **source.config,
        "model_type": family,
        "architectures": [_ARCHITECTURES[family]],
        "intermediate_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": source.head_dim,
    }
    biases: set[str] = set()
    for name in {name for layer in source.layers for name in layer.added_bias}:
        key, projections = _BIAS_KEYS[name][family]
        config[key] = True
        biases |= set(projections)
    targets = [TargetSizes(width, heads, kv_heads, frozenset(biases)) for _ in source.layers]
    tensors = [*other_tensors(source)]
    for index, layer in enumerate(targets):
        tensors += layer_tensors(source, index, layer)
    size = write_plain_folder(source, to, config, tensors, dtype=dtype, format="padded")
    return Exported(to, "padded", size, describe_padding(source, targets))


_ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def _family(source: ModelFolder, *, biased: bool) -> str:
    """Return the stock family to write: a Mistral without sliding window is a LLaMA, which has places for biases."""
    full = source.config.get("sliding_window") is None
    return "llama" if source.family == "mistral" and biased and full else source.family
