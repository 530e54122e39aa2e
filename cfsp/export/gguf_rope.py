"""RoPE of a model folder as llama.cpp holds it: the kinds of scaling that each of its architectures reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cfsp.errors import UnsupportedModelError
from cfsp.export.folder import ModelFolder

#: Which ways to scale RoPE are known there. llama3: a tensor of factors, that the others do not read.
_EVERYWHERE = ("default", "linear", "yarn")
ROPE_TYPES = {
    "llama": (*_EVERYWHERE, "llama3"),
    "deci": (*_EVERYWHERE, "llama3"),
    "qwen2": _EVERYWHERE,
    "qwen3": _EVERYWHERE,
    "openelm": _EVERYWHERE,
}
#: Settings of YaRN that programs on llama.cpp do not take from the file, with the values that they assume.
_YARN_ASSUMED = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": None, "mscale": None}


def rope_of(source: ModelFolder, config: Mapping[str, Any]) -> dict[str, Any]:
    rope = dict(config.get("rope_parameters") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    kind, part = rope["rope_type"], rope.get("partial_rotary_factor", 1.0)
    known = {one for ways in ROPE_TYPES.values() for one in ways}
    if kind not in known or (source.family == "qwen3" and kind not in ROPE_TYPES["qwen3"]):
        raise UnsupportedModelError(
            f"{source.folder}: RoPE of rope_type={kind} cannot be written for {source.family}; GGUF takes "
            f"{', '.join(sorted(known))} (qwen3: {', '.join(ROPE_TYPES['qwen3'])}); use format=hf"
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


def llama3_factors(head_dim: int, rope: Mapping[str, Any]) -> Tensor:
    """What llama.cpp divides each frequency by, [head_dim / 2]."""
    plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    wavelength = 2 * math.pi / plain
    low, high, original = (
        float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / float(rope["factor"]) + smooth)).float()
