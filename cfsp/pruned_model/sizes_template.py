"""Templates of the code that ships with a model whose layers differ in widths, heads, submodules or biases.

:func:`cfsp.pruned_model.family.pruned_family` fills the names of a family into the two ``string.Template`` texts. The
result has to work without cfsp, and with the same text in transformers 4.57 and 5.
"""

from __future__ import annotations

from string import Template

LICENCE = """\
# Copyright 2026 The cfsp maintainers
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""

CONFIGURATION = Template(
    LICENCE
    + '''\
"""Configuration of a ${base_type} model whose layers differ; `per_layer_config` says in what."""

${import_config}


class ${pruned_config}(${base_config}):
    model_type = "${pruned_type}"

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # transformers 5 writes `rope_parameters` alone; transformers 4 ignores it and takes its own theta.
        rope = config_dict.get("rope_parameters") or {}
        if "rope_theta" in rope and "rope_theta" not in config_dict:
            legacy = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
            scaled = rope.get("rope_type", "default") != "default"
            scaling = {key: value for key, value in rope.items() if key not in legacy} if scaled else None
            config_dict = {**config_dict, **legacy, "rope_scaling": scaling}
        return super().from_dict(config_dict, **kwargs)
'''
)

MODELING = Template(
    LICENCE
    + '''\
"""A ${base_type} model whose layers differ in what a pruning left of them.

The stock model is built first; then each layer named in `config.per_layer_config` becomes what its entry says:
  {"3": {"intermediate_size": 2048}}                                 a feed-forward width of its own
  {"3": {"num_attention_heads": 16, "num_key_value_heads": 4}}       fewer attention heads
  {"3": {"skip": ["attention"]}} or ["mlp"]                          a submodule that is not there (adds nothing)
and the output projections named in `config.added_bias`, {"3": ["mlp.down_proj"]}, get a bias. Norms named in
`config.shared_norms` serve attention and feed-forward network alike and stay. Nothing else differs.
"""

import torch
from torch import nn
${import_models}

from .${configuration_module} import ${pruned_config}

# The norms that serve a submodule alone; they go with it.
NORMS = ${norms}
KNOWN = {"intermediate_size", "num_attention_heads", "num_key_value_heads", "skip"}


class NoAttention(nn.Module):
    """Stands where an attention was removed: adds nothing to the residual stream, keeps nothing in the cache."""

    removed = "attention"

    def forward(self, hidden_states, *args, **kwargs):
        return torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    """Stands where a feed-forward network was removed: adds nothing to the residual stream."""

    removed = "mlp"

    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states)


def skip(layer, kind, shared=()):
    """Put a stub in the place of a submodule ("attention" or "mlp"); its norms go too, but for the shared ones."""
    if kind not in NORMS:
        raise ValueError(f"skip: attention and mlp can be missing, not {kind!r}")
    if kind == "attention":
        layer.self_attn = NoAttention()
    else:
        layer.mlp = NoMLP()
    for name in NORMS[kind]:
        if name not in shared:
            setattr(layer, name, nn.Identity())


def _resized(linear, in_features, out_features, bias=None):
    weight = linear.weight
    bias = linear.bias is not None if bias is None else bias
    return nn.Linear(in_features, out_features, bias=bias, device=weight.device, dtype=weight.dtype)


def _narrow(mlp, width):
    mlp.gate_proj = _resized(mlp.gate_proj, mlp.gate_proj.in_features, width)
    mlp.up_proj = _resized(mlp.up_proj, mlp.up_proj.in_features, width)
    mlp.down_proj = _resized(mlp.down_proj, width, mlp.down_proj.out_features)
    if hasattr(mlp, "intermediate_size"):
        mlp.intermediate_size = width


def _fewer_heads(attention, heads, kv_heads):
    sizes = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
    for name, n in sizes.items():
        linear = getattr(attention, name)
        setattr(attention, name, _resized(linear, linear.in_features, n * attention.head_dim))
    output = attention.o_proj
    attention.o_proj = _resized(output, heads * attention.head_dim, output.out_features)
    count_heads(attention, heads, kv_heads)


def count_heads(attention, heads, kv_heads):
    """Bring the attributes that repeat a number of heads up to date, where the family has them."""
    counts = {"num_heads": heads, "num_key_value_heads": kv_heads, "num_key_value_groups": heads // kv_heads}
    for name, n in counts.items():
        if hasattr(attention, name):
            setattr(attention, name, n)


def number_cache_slots(model):
    """Give the attentions that are there the first slots of the cache, each one of its own type (sliding or full)."""
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * len(model.layers)
    free = {kind: [i for i, t in enumerate(types) if t == kind] for kind in set(types)}
    for layer, kind in zip(model.layers, types):
        if hasattr(layer.self_attn, "layer_idx"):
            layer.self_attn.layer_idx = free[kind].pop(0)


def _apply_per_layer_config(model):
    # A plain dict in transformers < 5.14, a view of configurations since; to_dict() gives a dict in both.
    config = model.config.to_dict()
    for index, entries in (config.get("per_layer_config") or {}).items():
        unknown = sorted(set(entries) - KNOWN)
        if unknown:
            raise ValueError(f"per_layer_config[{index}]: only {sorted(KNOWN)} are known, not {unknown}")
        layer = model.layers[int(index)]
        if "intermediate_size" in entries:
            _narrow(layer.mlp, entries["intermediate_size"])
        if "num_attention_heads" in entries:
            _fewer_heads(layer.self_attn, entries["num_attention_heads"], entries["num_key_value_heads"])
        for kind in entries.get("skip", []):
            skip(layer, kind, config.get("shared_norms") or ())
    for index, names in (config.get("added_bias") or {}).items():
        for name in names:
            parent, _, attribute = name.rpartition(".")
            owner = model.layers[int(index)].get_submodule(parent)
            linear = getattr(owner, attribute)
            setattr(owner, attribute, _resized(linear, linear.in_features, linear.out_features, bias=True))
    number_cache_slots(model)


class ${pruned_model}(${base_model}):
    config_class = ${pruned_config}

    def __init__(self, config):
        super().__init__(config)
        _apply_per_layer_config(self)
        self.post_init()


class ${pruned_causal_lm}(${base_causal_lm}):
    config_class = ${pruned_config}

    def __init__(self, config):
        super().__init__(config)
        # The stock constructor built a stock decoder; once narrowed it is what this class describes.
        _apply_per_layer_config(self.model)
        self.model.__class__ = ${pruned_model}
        self.post_init()
'''
)
