"""Class and configuration of a sliced model: :func:`adopt` sets those that describe its layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cfsp.errors import UnsupportedModelError
from cfsp.pruned_model.family import PrunedFamily, pruned_family, replace_config
from cfsp.pruned_model.layer_changes import adopt_by_shapes
from cfsp.pruned_model.names import SUBMODULES, stock_type
from cfsp.pruned_model.stock import gated_linears, stock_classes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


#: The output projections that a bias compensation can give a bias.
_BIASED = ("self_attn.o_proj", "mlp.down_proj")


def adopt(model: PreTrainedModel) -> None:
    """Set the class and the configuration of ``model`` that describe its layers as they are now.

    A model that the stock class with a plain configuration describes keeps that class, or gets it back. Every other
    model becomes the family's ``Pruned...ForCausalLM`` with a ``per_layer_config``. The configuration is replaced by a
    copy, because another model may have been built from the same object. Parameters are not touched.

    Raises:
        UnsupportedModelError: the model is no causal language model of a family that ``pruned_family`` knows, its
            layers have another structure, or no attention is left.
    """
    check_adoptable(model)
    base_type = stock_type(model.config.model_type)
    base_config, base_model, base_causal_lm = stock_classes(base_type)
    family = pruned_family(base_type)
    if family.form == "shapes":
        adopt_by_shapes(model, family)
        return
    shapes = [_shape(model, index) for index in range(len(model.model.layers))]
    config = copy.deepcopy(model.config)
    config.per_layer_config = None
    # A configuration read from a file carries its model_type itself, hiding that of the class.
    config.__dict__.pop("model_type", None)
    for leftover in ("auto_map", "allow_global_per_layer_attribute_access", "added_bias", "shared_norms"):
        config.__dict__.pop(leftover, None)
    config.__class__ = base_config
    _set_first_layer_type(config, shapes)
    _update_sizes(model, shapes, family)
    biases = _added_biases(model, config, base_causal_lm, shapes)
    if _is_plain(shapes, biases, config):
        classes: tuple[type, type, type] = (base_config, base_model, base_causal_lm)
        config.intermediate_size = shapes[0].intermediate_size
        _set_heads(config, shapes[0])
    else:
        classes = (family.config_class, family.model_class, family.causal_lm_class)
        config.__class__ = family.config_class
        config.auto_map = family.auto_map
        # Without it transformers raises on every read of config.intermediate_size, even from getattr(..., None).
        config.allow_global_per_layer_attribute_access = True
        config.intermediate_size = max([config.intermediate_size, *(shape.intermediate_size or 0 for shape in shapes)])
        if biases:
            config.added_bias = biases
        if shared := _shared_norms(model, family):
            config.shared_norms = shared
        config.per_layer_config = _per_layer(shapes, config)
    config.architectures = [classes[2].__name__]
    model.model.__class__, model.__class__ = classes[1], classes[2]
    replace_config(model, model.config, config)
    family.modeling.number_cache_slots(model.model)


def _set_first_layer_type(config: PretrainedConfig, shapes: list[_LayerShape]) -> None:
    """Give layer 0, if it lost its attention, the type (sliding or full) of the first layer that has one.

    The cache has a slot of each layer's type and counts tokens in slot 0, so an attention of that type must use it.
    """
    with_attention = [index for index, shape in enumerate(shapes) if shape.heads is not None]
    if not with_attention:
        raise UnsupportedModelError("no attention is left in any layer; such a model cannot run")
    types = getattr(config, "layer_types", None)
    if types and with_attention[0] != 0:
        config.layer_types = [types[with_attention[0]], *types[1:]]


@dataclass(frozen=True)
class _LayerShape:
    """Sizes of a layer.

    Attributes:
        intermediate_size: FFN neurons; None where the FFN was removed.
        heads: query heads; None where the attention was removed.
        kv_heads: KV heads; None where the attention was removed.
    """

    intermediate_size: int | None
    heads: int | None
    kv_heads: int | None


def _shape(model: PreTrainedModel, index: int) -> _LayerShape:
    layer = model.model.layers[index]
    width = heads = kv_heads = None
    if not _is_stub(layer.mlp):
        gate, up, down = gated_linears(layer, f"layer {index} of {type(model).__name__}")
        widths = (gate.weight.shape[0], up.weight.shape[0], down.weight.shape[1])
        if len(set(widths)) != 1:
            raise UnsupportedModelError(f"layer {index}: its gate, up and down have the widths {widths}")
        width = widths[0]
    attention = layer.self_attn
    if not _is_stub(attention):
        head_dim = getattr(attention, "head_dim", 0)
        q, k = getattr(attention, "q_proj", None), getattr(attention, "k_proj", None)
        if head_dim and isinstance(q, nn.Linear) and isinstance(k, nn.Linear):
            heads, kv_heads = q.weight.shape[0] // head_dim, k.weight.shape[0] // head_dim
        else:  # an attention of another structure, which no pruner narrows
            heads = model.config.num_attention_heads
            kv_heads = getattr(model.config, "num_key_value_heads", heads)
    return _LayerShape(width, heads, kv_heads)


def _is_stub(module: nn.Module) -> bool:
    return getattr(module, "removed", None) in SUBMODULES


def _is_plain(shapes: list[_LayerShape], biases: dict[str, list[str]], config: PretrainedConfig) -> bool:
    """Return whether the stock class with a plain configuration describes these layers."""
    first = shapes[0]
    if biases or any(shape != first for shape in shapes) or first.intermediate_size is None or first.heads is None:
        return False
    # transformers checks this of a LLaMA-like configuration; other numbers of heads need the pruned classes.
    return first.heads == config.num_attention_heads or config.hidden_size % first.heads == 0


def _shared_norms(model: PreTrainedModel, family: PrunedFamily) -> list[str]:
    """Return the norms that stayed where the submodule was removed that they serve alone elsewhere in the family.

    This happens in blocks with a parallel residual.
    """
    return sorted(
        {
            name
            for layer in model.model.layers
            for kind, attribute in SUBMODULES.items()
            if _is_stub(getattr(layer, attribute))
            for name in family.norms[kind]
            # StableLM's block with a parallel residual has one norm for both; the other attribute is None.
            if (norm := getattr(layer, name)) is not None and list(norm.parameters())
        }
    )


def _set_heads(config: PretrainedConfig, shape: _LayerShape) -> None:
    if shape.heads != config.num_attention_heads:
        config.head_dim = _head_dim(config)
        config.num_attention_heads, config.num_key_value_heads = shape.heads, shape.kv_heads


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _per_layer(shapes: list[_LayerShape], config: PretrainedConfig) -> dict[int | str, dict[str, Any]]:
    """Return ``per_layer_config``: index of a layer -> its differences from ``config``, which gets the common sizes."""
    entries: dict[int | str, dict[str, Any]] = {}
    if any(shape.heads not in (None, config.num_attention_heads) for shape in shapes):
        # Without head_dim, tools derive it from a layer's number of heads.
        config.head_dim = _head_dim(config)
    unequal = len({shape.intermediate_size for shape in shapes}) > 1
    if not unequal and shapes[0].intermediate_size is not None:
        config.intermediate_size = shapes[0].intermediate_size
    for index, shape in enumerate(shapes):
        entry: dict[str, Any] = {}
        if shape.intermediate_size is not None and unequal:
            entry["intermediate_size"] = shape.intermediate_size
        if shape.heads is not None and shape.heads != config.num_attention_heads:
            entry |= {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads}
        missing = [
            kind for kind, size in (("attention", shape.heads), ("mlp", shape.intermediate_size)) if size is None
        ]
        if missing:
            entry["skip"] = missing
        if entry:
            entries[index] = entry
    return entries


def _added_biases(
    model: PreTrainedModel, config: PretrainedConfig, stock: type, shapes: list[_LayerShape]
) -> dict[str, list[str]]:
    """Return the output projections of each layer that have a bias although the stock class gives them none."""
    small = copy.deepcopy(config)
    small._attn_implementation = "eager"
    with torch.device("meta"):
        expected = stock(small).model.layers
    added: dict[str, list[str]] = {}
    for index, (layer, plain) in enumerate(zip(model.model.layers, expected, strict=True)):
        _check_scales(layer, plain, index)
        for name in _BIASED:
            parent = name.partition(".")[0]
            if _is_stub(getattr(layer, parent)):
                continue
            linear, stock_linear = layer.get_submodule(name), plain.get_submodule(name)
            if linear.bias is not None and stock_linear.bias is None:
                added.setdefault(str(index), []).append(name)
    return added


def _check_scales(layer: nn.Module, stock: nn.Module, index: int) -> None:
    """Refuse a layer with a scale that its class derives from the layer's index.

    In a shorter model the stock class would derive another scale, which no size in the configuration says.
    """
    plain = dict(stock.named_modules())
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            other = vars(plain[path]).get(name) if path in plain else None
            if isinstance(value, float) and isinstance(other, float) and value != other:
                raise UnsupportedModelError(
                    f"{type(layer).__name__}: {path}.{name} is {value:.4g}, as in the layer that it was before whole "
                    f"blocks went; a folder would give layer {index} {other:.4g}; use a pruner that removes no blocks"
                )


def _update_sizes(model: PreTrainedModel, shapes: list[_LayerShape], family: PrunedFamily) -> None:
    """Update the attributes of the modules that repeat a size."""
    for layer, shape in zip(model.model.layers, shapes, strict=True):
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        for linear in linears:
            linear.out_features, linear.in_features = linear.weight.shape
        if hasattr(layer.mlp, "intermediate_size"):
            layer.mlp.intermediate_size = shape.intermediate_size
        if shape.heads is not None:
            family.modeling.count_heads(layer.self_attn, shape.heads, shape.kv_heads)


def check_adoptable(model: PreTrainedModel) -> None:
    """Check, before anything is sliced, that :func:`adopt` supports the model (also on the meta device).

    Raises:
        UnsupportedModelError: the model is no causal language model of a family that transformers knows.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: a causal language model of transformers is needed, e.g. from cfsp.load(FOLDER)"
        )
    base_causal_lm = stock_classes(stock_type(model_type))[2]
    if not isinstance(model, base_causal_lm):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be pruned: a {base_causal_lm.__name__} is needed; unwrap it first (for "
            "LoRA: merge_and_unload); a model with code of its own can be evaluated (pruner=none), not pruned"
        )
    pruned_family(stock_type(model_type))
