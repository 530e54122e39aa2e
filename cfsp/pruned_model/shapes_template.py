"""Template of the code that ships with a pruned model of any family: differences are given by shapes and numbers.

It serves the families that :mod:`cfsp.pruned_model.sizes_template`, whose named sizes other tools read, does not fit:
plain and fused FFNs, fused q, k and v, Conv1D, mixtures of experts. It has the same placeholders except the norms.
"""

from __future__ import annotations

from string import Template

from cfsp.pruned_model.sizes_template import LICENCE

MODELING = Template(
    LICENCE
    + '''\
"""A ${base_type} model whose layers differ in what a pruning left of them.

The stock model is built first; then each layer named in `config.layer_changes` becomes what its entry says:
  {"3": {"shapes": {"mlp.fc1.weight": [100, 64]}}}          a tensor of another shape, or one that was not there
  {"3": {"set": {"mlp.fc1.out_features": 100}}}             a number that a module keeps
  {"3": {"heads": {"attn": {"num_attention_heads": 3}}}}    the configuration as that attention sees it
  {"3": {"skip": {"attn": "attention"}}} or "mlp"           a submodule that is not there (adds nothing)
  {"3": {"identity": ["ln_1"]}}                             a module that went with it
  {"3": {"lists": {"mlp.experts": 4}}}                      a list of modules that is shorter
Nothing else differs.
"""

import inspect

import torch
from torch import nn
${import_models}

from .${configuration_module} import ${pruned_config}

KNOWN = {"shapes", "set", "heads", "skip", "identity", "lists"}


class NoAttention(nn.Module):
    """Stands where an attention was removed: adds nothing to the residual stream, keeps nothing in the cache."""

    removed = "attention"

    def __init__(self, adds_residual):
        super().__init__()
        self.adds_residual = adds_residual

    def forward(self, *args, **kwargs):
        return _nothing(self.adds_residual, args, kwargs), None


class NoMLP(nn.Module):
    """Stands where a feed-forward network was removed: adds nothing to the residual stream."""

    removed = "mlp"

    def __init__(self, adds_residual):
        super().__init__()
        self.adds_residual = adds_residual

    def forward(self, *args, **kwargs):
        return _nothing(self.adds_residual, args, kwargs)


def _nothing(adds_residual, args, kwargs):
    # Some families have the submodule itself add its output to the residual stream, which it is given second.
    if adds_residual:
        return kwargs["residual"] if "residual" in kwargs else args[1]
    return torch.zeros_like(args[0] if args else kwargs["hidden_states"])


class LayerConfig:
    """A configuration as one attention sees it: with numbers of heads of its own, the rest as it is."""

    def __init__(self, config, heads):
        self.__dict__["config"], self.__dict__["heads"] = config, heads

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        heads = self.__dict__["heads"]
        return heads[name] if name in heads else getattr(self.__dict__["config"], name)


def layers_of(model):
    """The list of decoder layers of a ${base_model}: the outermost one that has as many as the configuration says."""
    n = model.config.num_hidden_layers
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == n)


def skip(layer, name, kind):
    """Put a stub in the place of a submodule ("attention" or "mlp")."""
    if kind not in ("attention", "mlp"):
        raise ValueError(f"skip: attention and mlp can be missing, not {kind!r}")
    adds_residual = "residual" in inspect.signature(type(getattr(layer, name)).forward).parameters
    setattr(layer, name, (NoAttention if kind == "attention" else NoMLP)(adds_residual))


def _reshape(layer, name, shape):
    owner, _, attribute = name.rpartition(".")
    module = layer.get_submodule(owner) if owner else layer
    old = getattr(module, attribute)
    like = old if old is not None else module.weight
    if attribute in module._buffers:
        module._buffers[attribute] = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return
    setattr(module, attribute, nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device)))


def _apply_layer_changes(model):
    for index, entries in (getattr(model.config, "layer_changes", None) or {}).items():
        unknown = sorted(set(entries) - KNOWN)
        if unknown:
            raise ValueError(f"layer_changes[{index}]: only {sorted(KNOWN)} are known, not {unknown}")
        layer = layers_of(model)[int(index)]
        for name, kind in entries.get("skip", {}).items():
            skip(layer, name, kind)
        for name in entries.get("identity", []):
            setattr(layer, name, nn.Identity())
        for name, length in entries.get("lists", {}).items():
            del layer.get_submodule(name)[length:]
        for name, shape in entries.get("shapes", {}).items():
            _reshape(layer, name, shape)
        for name, value in entries.get("set", {}).items():
            owner, _, attribute = name.rpartition(".")
            setattr(layer.get_submodule(owner) if owner else layer, attribute, value)
        for name, heads in entries.get("heads", {}).items():
            attention = layer.get_submodule(name)
            attention.config = LayerConfig(attention.config, heads)


class ${pruned_model}(${base_model}):
    config_class = ${pruned_config}

    def __init__(self, config):
        super().__init__(config)
        _apply_layer_changes(self)
        self.post_init()


class ${pruned_causal_lm}(${base_causal_lm}):
    config_class = ${pruned_config}

    def __init__(self, config):
        super().__init__(config)
        # The stock constructor built a stock model; once changed it is what this class describes.
        _apply_layer_changes(self.base_model)
        self.base_model.__class__ = ${pruned_model}
        self.post_init()
'''
)
