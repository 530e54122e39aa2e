"""RoPE in GGUF: the kinds of scaling that each architecture of llama.cpp reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cfsp.errors import UnsupportedModelError
from cfsp.export.folder import ModelFolder

#: Architecture of llama.cpp -> the kinds of RoPE scaling that it reads. llama3 is a tensor of factors in the file.
_EVERYWHERE = ("default", "linear", "yarn")
ROPE_TYPES = {
    "llama": (*_EVERYWHERE, "llama3"),
    "deci": (*_EVERYWHERE, "llama3"),
    "qwen2": _EVERYWHERE,
    "qwen3": _EVERYWHERE,
    "openelm": _EVERYWHERE,
}
#: Settings of YaRN that llama.cpp does not read from the file, with the values that it assumes.
_YARN_ASSUMED = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": None, "mscale": None}


def read_rope_settings(source: ModelFolder, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the RoPE settings of a model folder, with type and theta filled in.

    Args:
        source: the model folder.
        config: config.json of the base architecture, with transformers' defaults.

    Raises:
        UnsupportedModelError: GGUF cannot express the scaling for this family; names the key.
    """
    rope = dict(config.get("rope_parameters") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    kind, partial = rope["rope_type"], rope.get("partial_rotary_factor", 1.0)
    known = {rope_type for ways in ROPE_TYPES.values() for rope_type in ways}
    if kind not in known or (source.family == "qwen3" and kind not in ROPE_TYPES["qwen3"]):
        raise UnsupportedModelError(
            f"{source.folder}: RoPE of rope_type={kind} cannot be written for {source.family}; GGUF takes "
            f"{', '.join(sorted(known))} (qwen3: {', '.join(ROPE_TYPES['qwen3'])}); use format=hf"
        )
    for key, assumed in _YARN_ASSUMED.items() if kind == "yarn" else ():
        if rope.get(key) not in (None, assumed):
            raise UnsupportedModelError(
                f"{source.folder}: YaRN with {key}={rope[key]} cannot be written in GGUF, only {assumed} can; use "
                "format=hf"
            )
    if partial != 1.0:
        raise UnsupportedModelError(
            f"{source.folder}: partial_rotary_factor={partial} cannot be written in GGUF, which rotates whole heads; "
            "use format=hf"
        )
    return rope
