"""Refusal of models that are no decoder-only language models, before their blocks are looked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from cfsp.errors import UnsupportedModelError

#: Attribute names of attention over an encoder's states, and of parameters that only state-space and recurrent mixers
#: have.
_CROSS_ATTENTION = ("encoder_attn", "encoder_attention", "cross_attn", "crossattention")
_STATE_SPACE = ("A_log", "time_decay", "time_mix_key")


def other_kind(config: Any) -> str | None:
    """Name the kind of model that a configuration describes, if no decoder-only language model; else return None."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    model_type = getattr(config, "model_type", None)
    if getattr(config, "is_encoder_decoder", False):
        return f"an encoder-decoder model (model_type={model_type})"
    if getattr(config, "vision_config", None) is not None:
        return (
            f"a vision-language model (model_type={model_type}, with a vision_config); model.part=language_model "
            "prunes its language model alone"
        )
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return f"an encoder (model_type={model_type}), whose attention looks both ways"
    return None


def refuse_other_kinds(model: Any) -> None:
    """Refuse a model that is no decoder-only language model.

    Raises:
        UnsupportedModelError: names the kind of model.
    """
    kind = next(_signs(model), None) or other_kind(model.config)
    if kind is not None:
        raise UnsupportedModelError(f"{type(model).__name__} is {kind}; decoder-only language models can be pruned")


def _signs(model: nn.Module) -> Iterator[str]:
    """Yield what in the modules shows that the model is the decoder of an encoder-decoder model."""
    for name, module in model.named_modules():
        for attribute in _CROSS_ATTENTION:
            if isinstance(getattr(module, attribute, None), nn.Module):
                yield f"the decoder of an encoder-decoder model (attention over an encoder in {name}.{attribute})"


def state_space(block: nn.Module) -> str | None:
    """Return the name of a parameter that only state-space and recurrent mixers have; None where there is none."""
    names = (name for name, _ in block.named_parameters())
    return next((name for name in names if name.rpartition(".")[2] in _STATE_SPACE), None)
