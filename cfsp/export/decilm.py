"""DeciLM export (nemotron-nas): a layout that vLLM has a class for and that llama.cpp's converter reads.

vLLM and the converter both derive a width from ``ffn_mult`` and round it up to a multiple of 256, so widths are filled
up to such multiples with zero neurons. The number of query heads is the same for all layers, so missing KV groups are
filled up too. A layer without attention is a no-op, except for the first one, whose attention vLLM needs. An FFN of
zeros stands for a missing one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cfsp.errors import UnsupportedModelError
from cfsp.export.filling import TargetSizes, describe_padding, layer_tensors, other_tensors, round_up, sizes
from cfsp.export.folder import ModelFolder, check_tensors_stored
from cfsp.export.plain_folder import write_plain_folder
from cfsp.export.result import Exported

#: Multiple to which both readers round a width up.
MULTIPLE = 256
_CONFIGURATION = '''\
"""Configuration of a DeciLM folder: `block_configs` as objects, which vLLM reads by attribute."""

from transformers import LlamaConfig


class Entry(dict):
    """A dictionary whose keys are attributes too."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        found = super().from_dict(config_dict, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        config.block_configs = [
            Entry({part: Entry(settings) for part, settings in block.items()}) for block in config.block_configs
        ]
        return found
'''


def check(source: ModelFolder) -> None:
    """Check from headers alone that the layout can hold the model.

    Raises:
        UnsupportedModelError: it cannot; names the family or the layer, and the reason.
        CheckpointError: the folder is not whole.
    """
    check_tensors_stored(source)
    if source.family == "qwen3":
        raise UnsupportedModelError(
            f"{source.folder}: qwen3 norms its queries and keys, which DeciLM has no place for; use format=hf or padded"
        )
    if source.config.get("sliding_window") and source.config.get("use_sliding_window", True):
        raise UnsupportedModelError(
            f"{source.folder}: DeciLM has no sliding window ({source.config['sliding_window']}); use format=hf or "
            "padded"
        )
    for index, layer in enumerate(source.layers):
        if layer.added_bias:
            raise UnsupportedModelError(
                f"{source.folder}: layer {index} has a bias at {layer.added_bias[0]} (pruner.compensation=bias), for "
                "which DeciLM has no place; use format=hf or padded, or prune with pruner.compensation=none"
            )


def export(source: ModelFolder, to: Path, *, dtype: torch.dtype | None = None, multiple: int = MULTIPLE) -> Exported:
    """Write the model to the folder ``to``, all or nothing.

    Args:
        source: the model folder.
        to: folder to write; one that cfsp wrote earlier is replaced.
        dtype: dtype of the tensors; None: as they are stored.
        multiple: multiple to which FFN widths are filled up; itself a multiple of 256.

    Raises:
        UnsupportedModelError: as :func:`check`.
        CheckpointError: the folder is not whole, or ``to`` cannot be written.
    """
    check(source)
    _, heads, kv_heads = sizes(source.layers)
    target_widths, blocks = [], []
    for index, layer in enumerate(source.layers):
        width = round_up(max(layer.width, 1), multiple)
        attends = bool(layer.heads) or index == 0
        target_widths.append(TargetSizes(width, heads if attends else 0, kv_heads if attends else 0))
        attention: dict[str, Any] = {"no_op": not attends, "replace_with_linear": False}
        attention["n_heads_in_group"] = heads // kv_heads if attends else None
        ffn = {"no_op": False, "replace_with_linear": False, "ffn_mult": ffn_mult(width, source.hidden)}
        blocks.append({"attention": attention, "ffn": ffn})
    config: dict[str, Any] = {
        **source.config,
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": source.head_dim,
        "intermediate_size": max(w.width for w in target_widths),
        "block_configs": blocks,
    }
    if "self_attn.q_proj" in source.biased:
        config["qkv_bias"] = True
    tensors = [*other_tensors(source)]
    for index, sized in enumerate(target_widths):
        tensors += layer_tensors(source, index, sized)
    files = {"configuration_decilm.py": _CONFIGURATION.encode()}
    size = write_plain_folder(source, to, config, tensors, dtype=dtype, format="decilm", files=files)
    return Exported(to, "decilm", size, describe_padding(source, target_widths))


def ffn_mult(width: int, hidden: int) -> float:
    """Return the multiplier that both readers turn into ``width`` = ceil256(int(2 * ffn_mult * hidden / 3))."""
    return 3 * width / (2 * hidden)
