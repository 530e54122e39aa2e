"""RoPE scaling in GGUF files: the factors that llama.cpp reads as a tensor, and the settings that it reads as keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfsp.errors import UnsupportedModelError
from cfsp.weights.gguf_header import GgufHeader

FACTORS = "rope_freqs.weight"
#: Settings of LLaMA 3.1 to 3.3 other than the factor, which differs between them (8 and 32).
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def llama3_factors(head_dim: int, rope: Mapping[str, Any]) -> Tensor:
    """Return the factors by which llama.cpp divides each frequency, [head_dim / 2] float32."""
    plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    wavelength = 2 * math.pi / plain
    low, high, original = (
        float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / float(rope["factor"]) + smooth)).float()


def scaling_in(header: GgufHeader, theta: float, head_dim: int, where: str) -> dict[str, Any]:
    """Return the RoPE scaling of a GGUF file as ``rope_parameters`` of transformers, whose reader leaves it out.

    Args:
        header: header of the file.
        theta: base of the frequencies.
        head_dim: dimension of a head.
        where: name of the file in messages.

    Returns:
        The keys beside ``rope_theta``; empty where the file has no scaling.

    Raises:
        UnsupportedModelError: transformers has no such scaling.
    """
    keys = {
        key.partition(".rope.scaling.")[2]: value
        for key, value in header.metadata.items()
        if key.startswith(f"{header.architecture}.rope.scaling.")
    }
    kind = keys.get("type", "none")
    if any(tensor.name == FACTORS for tensor in header.tensors):
        return _llama3(header.file, theta, head_dim, where)
    if kind == "none" or float(keys.get("factor", 1.0)) == 1.0:
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(keys["factor"])}
    if kind == "yarn" and "original_context_length" in keys:
        original = int(keys["original_context_length"])
        return {"rope_type": "yarn", "factor": float(keys["factor"]), "original_max_position_embeddings": original}
    raise UnsupportedModelError(
        f"{where}: RoPE scaling of the type {kind} is not read from GGUF (linear, yarn and llama3 are); give the "
        "model as a folder of safetensors"
    )


def _llama3(file: Path, theta: float, head_dim: int, where: str) -> dict[str, Any]:
    """Return the settings of LLaMA 3 whose factors the file holds: the file has the factors, not the settings."""
    from gguf import GGUFReader

    stored = next(tensor.data for tensor in GGUFReader(file).tensors if tensor.name == FACTORS)
    factors = torch.from_numpy(stored.copy()).float().flatten()
    settings = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
    expected = llama3_factors(head_dim, settings | {"rope_theta": theta})
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-4):
        raise UnsupportedModelError(
            f"{where}: {FACTORS} holds factors of RoPE that are not those of LLaMA 3.1 to 3.3, and transformers takes "
            "settings, not factors; give the model as a folder of safetensors"
        )
    return settings
