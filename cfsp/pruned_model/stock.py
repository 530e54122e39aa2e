"""Stock classes of a family in transformers, and the structure of their layers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from cfsp.architecture.attention import FUSED_NAMES
from cfsp.architecture.norms import served, watched
from cfsp.architecture.projection import is_matrix
from cfsp.errors import UnsupportedModelError
from cfsp.pruned_model.names import SUBMODULES

_GATED_LINEARS = ("gate_proj", "up_proj", "down_proj")
# Large enough for a mixture-of-experts family to show that only its first layers are dense.
_PROBE_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    # transformers warns about default token ids that lie outside a default vocabulary.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "vocab_size": 64,
}


def gated_linears(layer: nn.Module, where: str) -> list[nn.Linear]:
    """Return gate_proj, up_proj and down_proj of a layer's mlp.

    Args:
        layer: the layer.
        where: name of the layer in messages.

    Raises:
        UnsupportedModelError: the layer has no such mlp.
    """
    mlp = getattr(layer, "mlp", None)
    linears = [getattr(mlp, name, None) for name in _GATED_LINEARS]
    if not all(isinstance(linear, nn.Linear) for linear in linears):
        names = [] if mlp is None else [name for name, _ in mlp.named_children()]
        actual = f"{type(mlp).__name__} with {', '.join(names)}" if names else "no mlp"
        raise UnsupportedModelError(
            f"{where}: looked for an mlp with Linear {', '.join(_GATED_LINEARS)}, found {actual}"
        )
    return linears  # type: ignore[return-value]


def stock_classes(model_type: str) -> tuple[type, type, type]:
    """Return the classes of a stock ``model_type``: configuration, decoder and causal language model.

    Raises:
        UnsupportedModelError: transformers has no such model type, or not exactly one class of each kind for it.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    mappings: tuple[Any, Any] = (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"model_type={model_type}: transformers itself has no such model, and pruned models are built on its own "
            "classes; one that brings its code can be measured (pruner=none), not pruned"
        )
    config_class = CONFIG_MAPPING[model_type]
    classes = [mapping.get(config_class, None) for mapping in mappings]
    if not all(isinstance(cls, type) for cls in classes):
        raise UnsupportedModelError(
            f"model type '{model_type}': looked for one model class and one causal language model class in "
            f"transformers, found {classes}"
        )
    return config_class, classes[0], classes[1]


def check_sizes_form(model_type: str, config_class: type, model_class: type, causal_lm_class: type) -> None:
    """Check on a small model without memory that the form sizes fits the structure of the family.

    Raises:
        UnsupportedModelError: the structure is another one.
    """
    try:
        with torch.device("meta"), _silent():
            model: Any = causal_lm_class(config_class(**_PROBE_SIZES))
    except Exception as error:
        raise UnsupportedModelError(
            f"model type '{model_type}': no {causal_lm_class.__name__} of plain sizes can be built ({error})"
        ) from error
    decoder = getattr(model, "model", None)
    if type(decoder) is not model_class or not hasattr(decoder, "layers"):
        raise UnsupportedModelError(
            f"model type '{model_type}': looked for {causal_lm_class.__name__}.model of type "
            f"{model_class.__name__} with layers, found {[name for name, _ in model.named_children()]}"
        )
    for index, layer in enumerate(decoder.layers):
        gate, up, down = gated_linears(layer, f"model type '{model_type}', layer {index}")
        widths = (gate.out_features, up.out_features, down.in_features)
        if widths != (_PROBE_SIZES["intermediate_size"],) * 3:
            raise UnsupportedModelError(
                f"model type '{model_type}', layer {index}: looked for FFN matrices of width "
                f"config.intermediate_size={_PROBE_SIZES['intermediate_size']}, found {widths}"
            )
        # Sizes are read off these names and written to them; other heads would be described wrongly.
        if "self_attn.o_proj.weight" not in dict(layer.named_parameters()) or any(
            is_matrix(getattr(layer.self_attn, name, None)) for name in FUSED_NAMES
        ):
            raise UnsupportedModelError(
                f"model type '{model_type}', layer {index}: looked for an attention with an o_proj and no fused "
                f"projection, found {[name for name, _ in layer.named_children()]}"
            )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silence the log of transformers, in which a family may complain about sizes that are not its own."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def norms_of_family(config_class: type, causal_lm_class: type) -> dict[str, tuple[str, ...]]:
    """Return the norms that serve only the attention, or only the FFN, of a layer, from one pass of a small model."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model: Any = causal_lm_class(config_class(**_PROBE_SIZES)).eval()
    try:
        with watched(model.model.layers[0]) as inputs, torch.no_grad():
            model(torch.arange(4)[None], use_cache=False)
    except Exception:  # the family does not run like this; its norms then stay, which costs parameters and nothing else
        return dict.fromkeys(SUBMODULES, ())
    return served(inputs, {kind: (name,) for kind, name in SUBMODULES.items()})
