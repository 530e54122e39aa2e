"""The one source of the code that ships with a model whose FFN widths differ from layer to layer.

Two ``string.Template`` texts; ``remote_code.pruned_family`` fills in the names of a family. The result has to
work without cfsp, and with the same text in transformers 4.57 and 5.
"""

from __future__ import annotations

from string import Template

_LICENCE = """\
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
    _LICENCE
    + '''\
"""Configuration of a ${base_type} model whose layers differ; `per_layer_config` says in what."""

from transformers import ${base_config}


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
    _LICENCE
    + '''\
"""A ${base_type} model with a feed-forward width of its own in each layer.

The stock model is built first; then the layers named in `config.per_layer_config`, for example
{"3": {"intermediate_size": 2048}}, get feed-forward matrices of their own size. Nothing else differs.
"""

from torch import nn
from transformers import ${base_causal_lm}, ${base_model}

from .${configuration_module} import ${pruned_config}


def _resized(linear, in_features, out_features):
    weight = linear.weight
    bias = linear.bias is not None
    return nn.Linear(in_features, out_features, bias=bias, device=weight.device, dtype=weight.dtype)


def _narrow(mlp, width):
    mlp.gate_proj = _resized(mlp.gate_proj, mlp.gate_proj.in_features, width)
    mlp.up_proj = _resized(mlp.up_proj, mlp.up_proj.in_features, width)
    mlp.down_proj = _resized(mlp.down_proj, width, mlp.down_proj.out_features)
    if hasattr(mlp, "intermediate_size"):
        mlp.intermediate_size = width


def _apply_per_layer_config(model):
    # A plain dict in transformers < 5.14, a view of configurations since; to_dict() gives a dict in both.
    per_layer_config = model.config.to_dict().get("per_layer_config") or {}
    for index, entries in per_layer_config.items():
        unknown = sorted(set(entries) - {"intermediate_size"})
        if unknown:
            raise ValueError(f"per_layer_config[{index}]: only intermediate_size is known, not {unknown}")
        if "intermediate_size" in entries:
            _narrow(model.layers[int(index)].mlp, entries["intermediate_size"])


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
