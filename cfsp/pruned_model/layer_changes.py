"""Class and configuration of a pruned model of any family, by its differences from the stock model in each layer."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cfsp.architecture.attention import is_layer_config
from cfsp.architecture.views import is_removed, is_stub, resolve
from cfsp.errors import UnsupportedModelError
from cfsp.pruned_model.family import PrunedFamily, replace_config
from cfsp.pruned_model.names import stock_type
from cfsp.pruned_model.stock import stock_classes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from cfsp.architecture.views import DecoderView

#: Keys under which configurations state one FFN width for all layers.
_WIDTH_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "moe_intermediate_size")
#: Keys under which configurations state one number of experts for all layers.
_COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")

Changes = dict[str, dict[str, Any]]


def adopt_by_shapes(model: PreTrainedModel, family: PrunedFamily) -> None:
    """Set class and configuration like :func:`cfsp.pruned_model.adopt.adopt`, but by shapes instead of named sizes.

    The configuration gets ``layer_changes``, which :mod:`cfsp.pruned_model.shapes_template` explains.

    Raises:
        UnsupportedModelError: no attention is left, or the layers cannot be described like this.
    """
    view = resolve(model)
    layers = [block.module for block in view.blocks]
    if all(block.attention_removed for block in view.blocks):
        raise UnsupportedModelError("no attention is left in any layer; such a model cannot run")
    classes = stock_classes(stock_type(model.config.model_type))
    config = copy.deepcopy(model.config)
    config.__dict__.pop("model_type", None)  # a configuration from a file has its own, which hides that of the class
    for leftover in ("auto_map", "layer_changes"):
        config.__dict__.pop(leftover, None)
    config.__class__ = classes[0]
    number_cache_slots(layers, config)
    changes = _describe_changes(layers, _stock_layers(classes[2], config))
    if changes and (plain_keys := _find_plain_keys(layers, view, classes[2], config)):
        for key, value in plain_keys.items():
            setattr(config, key, value)
        changes = {}
    if changes:
        classes = (family.config_class, family.model_class, family.causal_lm_class)
        config.__class__ = family.config_class
        config.auto_map = family.auto_map
        config.layer_changes = changes
    config.architectures = [classes[2].__name__]
    model.base_model.__class__, model.__class__ = classes[1], classes[2]
    replace_config(model, model.config, config)


def remove_layers(model: PreTrainedModel, indices: Collection[int]) -> None:
    """Remove whole layers of ``model`` in place, with their entries in the configuration's lists."""
    view = resolve(model)
    container = view.container
    n = len(container)
    kept = [index for index in range(n) if index not in set(indices)]
    config = copy.deepcopy(model.config)
    for form in ("per_layer_config", "layer_changes"):
        if hasattr(config, form):
            setattr(config, form, None)  # adopt derives it from the layers again
    # layer_types, no_rope_layers and the like have one entry for each layer.
    per_layer = {
        name: value
        for name, value in vars(config).items()
        if "layer" in name and isinstance(value, list) and len(value) == n and name != "mlp_only_layers"
    }
    for index in sorted(set(indices), reverse=True):
        del container[index]
    config.num_hidden_layers = len(kept)
    for name, value in per_layer.items():
        setattr(config, name, [value[index] for index in kept])
    _renumber_mixtures(config, kept)
    replace_config(model, model.config, config)


def _renumber_mixtures(config: PretrainedConfig, kept: list[int]) -> None:
    """Renumber the keys that say by index which layers are mixtures of experts, for the layers ``kept``."""
    if isinstance(getattr(config, "mlp_only_layers", None), list) and hasattr(config, "decoder_sparse_step"):
        dense, step = set(config.mlp_only_layers), config.decoder_sparse_step
        config.mlp_only_layers = [at for at, index in enumerate(kept) if index in dense or (index + 1) % step]
        config.decoder_sparse_step = 1
    if isinstance(first := getattr(config, "first_k_dense_replace", None), int):
        config.first_k_dense_replace = sum(index < first for index in kept)


def number_cache_slots(layers: list[nn.Module], config: PretrainedConfig) -> None:
    """Give the remaining attentions the first slots of the cache, each a slot of its own type (sliding or full).

    The cache counts tokens in slot 0. So a layer 0 without attention gets the type of the first layer that has one.
    """
    attends = [not any(is_removed(module, "attention") for module in layer.modules()) for layer in layers]
    types = list(getattr(config, "layer_types", None) or ["full_attention"] * len(layers))
    if types and not attends[0] and any(attends):
        types[0] = types[attends.index(True)]
        if getattr(config, "layer_types", None):
            config.layer_types = types
    free = {kind: [i for i, other in enumerate(types) if other == kind] for kind in set(types)}
    for layer, kind, has_attention in zip(layers, types, attends, strict=True):
        slots = [m for m in layer.modules() if m is not layer and isinstance(getattr(m, "layer_idx", None), int)]
        if has_attention and slots:
            slot = free[kind].pop(0)
            for module in slots:
                module.layer_idx = slot  # type: ignore[assignment]


def _stock_layers(causal_lm_class: Any, config: PretrainedConfig) -> list[nn.Module]:
    """Return the layers that the stock class builds from ``config``, on the meta device."""
    small = copy.deepcopy(config)
    small._attn_implementation = "eager"
    with torch.device("meta"):
        return [block.module for block in resolve(causal_lm_class(small)).blocks]


def _describe_changes(layers: list[nn.Module], stock: list[nn.Module]) -> Changes:
    """Return ``layer_changes``: index of a layer -> its differences from the stock layer."""
    if len(layers) != len(stock):
        raise UnsupportedModelError(f"the model has {len(layers)} layers, its configuration makes {len(stock)}")
    entries = {str(at): _difference(*pair) for at, pair in enumerate(zip(layers, stock, strict=True))}
    return {at: entry for at, entry in entries.items() if entry}


def _difference(layer: nn.Module, stock: nn.Module) -> dict[str, Any]:
    """Return the entry of one layer in ``layer_changes``."""
    children, before = dict(layer.named_children()), dict(stock.named_children())
    skip = {name: child.removed for name, child in children.items() if is_stub(child)}
    identity = [
        name
        for name, child in children.items()
        if isinstance(child, nn.Identity) and not isinstance(before.get(name), nn.Identity)
    ]
    removed_children = {*skip, *identity}
    shorter = _shorter_lists(layer, stock, removed_children)
    entry: dict[str, Any] = {"skip": skip, "identity": identity, "lists": shorter}
    own, theirs = _shapes(layer, removed_children), _shapes(stock, removed_children)
    theirs = {name: shape for name, shape in theirs.items() if not _is_in_lost_item(name, shorter)}
    if lost := sorted(theirs.keys() - own.keys()):
        raise UnsupportedModelError(f"{type(layer).__name__}: {lost[0]} is gone; such a layer cannot be written down")
    entry["shapes"] = {name: shape for name, shape in own.items() if theirs.get(name) != shape}
    numbers = dict(_iterate_numbers(stock, removed_children))
    entry["set"] = {
        name: n for name, n in _iterate_numbers(layer, removed_children) if name in numbers and numbers[name] != n
    }
    entry["heads"] = {
        name: dict(vars(module.config)["heads"])
        for name, module in layer.named_modules()
        if name.partition(".")[0] not in removed_children and is_layer_config(getattr(module, "config", None))
    }
    return {kind: differences for kind, differences in entry.items() if differences}


def _shorter_lists(layer: nn.Module, stock: nn.Module, removed_children: Collection[str]) -> dict[str, int]:
    """Return the lengths, by path, of the lists of modules that are shorter now.

    A list loses items at its end, whichever experts were removed.
    """
    lists = {name: len(module) for name, module in layer.named_modules() if isinstance(module, nn.ModuleList)}
    before = {name: len(module) for name, module in stock.named_modules() if isinstance(module, nn.ModuleList)}
    return {
        name: n
        for name, n in lists.items()
        if name.partition(".")[0] not in removed_children and n < before.get(name, n)
    }


def _is_in_lost_item(name: str, shorter: dict[str, int]) -> bool:
    """Return whether a tensor belongs to an item that its list has lost."""
    return any(
        name.startswith(f"{path}.") and int(name.removeprefix(f"{path}.").partition(".")[0]) >= n
        for path, n in shorter.items()
    )


def _shapes(layer: nn.Module, removed_children: Collection[str]) -> dict[str, list[int]]:
    """Return the shapes of the parameters, and of the buffers that a checkpoint holds.

    DeepSeek-V3 keeps what its router adds to the scores in such a buffer.
    """
    return {
        name: list(tensor.shape)
        for name, tensor in layer.state_dict(keep_vars=True).items()
        if name.partition(".")[0] not in removed_children
    }


def _iterate_numbers(layer: nn.Module, removed_children: Collection[str]) -> Iterator[tuple[str, int | float]]:
    """Yield path and value of the numbers that the modules of a layer keep: sizes, heads, slots of the cache, scales.

    GPT-2 may divide by the index that a layer was built with (scale_attn_by_inverse_layer_idx), which is another one in
    a shorter model.
    """
    for path, module in layer.named_modules():
        if path.partition(".")[0] in removed_children:
            continue
        for name, value in vars(module).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and not name.startswith("_"):
                yield (f"{path}.{name}" if path else name), value


def _find_plain_keys(
    layers: list[nn.Module], view: DecoderView, causal_lm_class: Any, config: PretrainedConfig
) -> dict[str, int] | None:
    """Return keys and values with which a plain configuration describes all layers; None where there are none.

    The keys state one FFN width, or one width and one number of experts for all mixtures.
    """
    blocks = view.mixtures or list(view.blocks)
    widths = {block.units("neurons").n for block in blocks}
    counts = {block.units("experts").n for block in view.mixtures}
    if len(widths) != 1 or len(counts) > 1:
        return None
    width_keys = [{key: next(iter(widths))} for key in _WIDTH_KEYS if hasattr(config, key)]
    count_keys = [{key: next(iter(counts))} for key in _COUNT_KEYS if counts and hasattr(config, key)]
    both = [{**width, **count} for width in width_keys for count in count_keys]
    for values in [*width_keys, *count_keys, *both]:
        tried = copy.deepcopy(config)
        try:
            for key, value in values.items():
                setattr(tried, key, value)
            fits = not _describe_changes(layers, _stock_layers(causal_lm_class, tried))
        except Exception:  # a configuration that its class refuses describes nothing
            continue
        if fits:
            return values
    return None
