"""What an export starts from: a model folder, pruned or dense; sizes of each layer, tensors read one by one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfsp.config import ModelSection
from cfsp.errors import CheckpointError, UnsupportedModelError
from cfsp.models.remote_code import COMMON_FAMILIES, PRUNED_PREFIX, stock_type
from cfsp.models.shards import Shards
from cfsp.models.source import ModelSource, locate

#: What a pruned folder's config.json has beside the base architecture's own keys.
_PRUNED_KEYS = ("per_layer_config", "allow_global_per_layer_attribute_access", "added_bias", "auto_map")


@dataclass(frozen=True)
class Layer:
    """Sizes of one layer: FFN neurons (0: no FFN), query and KV heads (0: no attention), added output biases.

    added_bias: names within the layer ("mlp.down_proj", "self_attn.o_proj") of projections that carry a bias which the
    base architecture would not give them.
    """

    width: int
    heads: int
    kv_heads: int
    added_bias: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelFolder:
    """A model folder of a LLaMA-like family.

    family: the base architecture's model_type (llama, mistral, qwen2, qwen3); config: config.json as that architecture
    has it, without what pruning added (its intermediate_size and head counts are the global ones); dtype: what the
    tensors are stored in.
    """

    source: ModelSource
    family: str
    config: Mapping[str, Any]
    layers: tuple[Layer, ...]
    shards: Shards
    dtype: torch.dtype

    @property
    def folder(self) -> Path:
        return self.source.folder

    @property
    def hidden(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def head_dim(self) -> int:
        return int(self.config.get("head_dim") or self.hidden // self.config["num_attention_heads"])

    @property
    def tied(self) -> bool:
        """The LM head is the embedding."""
        return "lm_head.weight" not in self.shards

    @property
    def uniform(self) -> bool:
        """All layers are alike, and nothing of them is missing or added."""
        first = self.layers[0]
        return first.width > 0 and first.heads > 0 and not first.added_bias and set(self.layers) == {first}

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored, on the CPU (``model.layers.0.mlp.up_proj.weight``)."""
        return self.shards.read(name)

    def has(self, name: str) -> bool:
        return name in self.shards


def read_folder(path: str | Path) -> ModelFolder:
    """Read structure and headers of ``path``: a model folder, or a run's OUT, whose ``model`` is meant.

    Raises:
        CheckpointError: missing, incomplete or damaged. UnsupportedModelError: a family that no export knows.
    """
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    if not folder.is_dir():
        raise CheckpointError(
            f"path={path}: no such folder; give a model folder, or the folder of a run that saved one"
        )
    return read_source(locate(ModelSection(name=folder.name, path=str(folder.resolve()))))


def read_source(source: ModelSource) -> ModelFolder:
    """The same of a model that was located.

    Raises:
        CheckpointError, UnsupportedModelError: as :func:`read_folder`.
    """
    model_type = str(source.config.get("model_type", ""))
    family = stock_type(model_type)
    if family not in COMMON_FAMILIES:
        raise UnsupportedModelError(
            f"{source.origin}: model_type={model_type or None} cannot be exported; {', '.join(COMMON_FAMILIES)} can"
        )
    per_layer = {int(index): entry for index, entry in (source.config.get("per_layer_config") or {}).items()}
    added = {int(index): tuple(names) for index, names in (source.config.get("added_bias") or {}).items()}
    config = {key: copy.deepcopy(value) for key, value in source.config.items() if key not in _PRUNED_KEYS}
    config["model_type"] = family
    if model_type.startswith(PRUNED_PREFIX):
        config["architectures"] = [name.removeprefix("Pruned") for name in config.get("architectures", [])]
    shards = Shards(source.folder)
    layers = tuple(_layer(config, per_layer.get(n, {}), added.get(n, ())) for n in range(config["num_hidden_layers"]))
    return ModelFolder(source, family, config, layers, shards, getattr(torch, source.stored_dtype))


def _layer(config: Mapping[str, Any], entry: Mapping[str, Any], added: tuple[str, ...]) -> Layer:
    skipped = entry.get("skip", ())
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    return Layer(
        width=0 if "mlp" in skipped else int(entry.get("intermediate_size", config["intermediate_size"])),
        heads=0 if "attention" in skipped else int(entry.get("num_attention_heads", heads)),
        kv_heads=0 if "attention" in skipped else int(entry.get("num_key_value_heads", kv_heads)),
        added_bias=tuple(sorted(added)),
    )
