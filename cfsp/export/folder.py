"""What an export starts from: a model folder, pruned or dense; sizes of each layer, tensors read one by one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfsp.config.sections import ModelSection
from cfsp.errors import CheckpointError, UnsupportedModelError
from cfsp.pruned_model.family import PRUNED_PREFIX
from cfsp.pruned_model.names import COMMON_FAMILIES, stock_type
from cfsp.weights.fit import is_computed
from cfsp.weights.shards import Shards
from cfsp.weights.source import ModelSource, locate

#: What a pruned folder's config.json has beside the base architecture's own keys.
_PRUNED_KEYS = ("per_layer_config", "allow_global_per_layer_attribute_access", "added_bias", "auto_map")
_OF_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_OF_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
#: Family -> the projections that always have a bias there; those that have one where a key of config.json is true.
_ALWAYS_BIASED: Mapping[str, tuple[str, ...]] = {"qwen2": _OF_ATTENTION[:3]}
_BIASED_BY_KEY: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "llama": {"attention_bias": _OF_ATTENTION, "mlp_bias": _OF_MLP},
    "qwen3": {"attention_bias": _OF_ATTENTION},
}


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
    tensors are stored in; shapes: of the tensors that are there.
    """

    source: ModelSource
    family: str
    config: Mapping[str, Any]
    layers: tuple[Layer, ...]
    shards: Shards
    dtype: torch.dtype
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

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
        """The LM head is the embedding: config.json says so (all families: only where it does), and none is stored."""
        return bool(self.config.get("tie_word_embeddings")) and not self.has("lm_head.weight")

    @property
    def biased(self) -> tuple[str, ...]:
        """The projections ("mlp.down_proj") that the base architecture gives a bias in every layer."""
        by_key = _BIASED_BY_KEY.get(self.family, {})
        stated = tuple(name for key, names in by_key.items() if self.config.get(key) for name in names)
        return (*_ALWAYS_BIASED.get(self.family, ()), *stated)

    @property
    def dense(self) -> bool:
        """Nobody has pruned it here: a folder of the base architecture without cfsp's mark."""
        stock = self.source.config.get("model_type") == self.family
        return stock and self.source.state in (None, "dense")

    @property
    def uniform(self) -> bool:
        """All layers are alike, and nothing of them is missing or added."""
        first = self.layers[0]
        return first.width > 0 and first.heads > 0 and not first.added_bias and set(self.layers) == {first}

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored, on the CPU (``model.layers.0.mlp.up_proj.weight``)."""
        return self.shards.read(name)

    def has(self, name: str) -> bool:
        return name in self.shapes


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
    shards = Shards(source.folder)
    if source.config.get("tie_word_embeddings") and _has_own_head(shards):
        source = replace(source, config={**source.config, "tie_word_embeddings": False})
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
    if not model_type.startswith(PRUNED_PREFIX) and (per_layer or added):
        # The stock class would ignore them, build whole layers and fill what is missing with random weights.
        key = "per_layer_config" if per_layer else "added_bias"
        raise UnsupportedModelError(
            f"{source.origin}: config.json has {key} beside model_type={model_type}, whose layers are all alike; save "
            f"the model with cfsp, as {PRUNED_PREFIX}{family}, or take {key} out"
        )
    layers = tuple(_layer(config, per_layer.get(n, {}), added.get(n, ())) for n in range(config["num_hidden_layers"]))
    return ModelFolder(source, family, config, layers, shards, getattr(torch, source.stored_dtype), shards.shapes)


def _has_own_head(shards: Shards) -> bool:
    """Whether an LM head is stored that is not the embedding; config.json may say otherwise."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    return head in shards and embedding in shards and not shards.equal(head, embedding)


def check_there(source: ModelFolder) -> None:
    """See that every tensor which config.json asks for is stored, in the shape it says; no weight is read.

    What is filled up or left out of an export is decided by what the layers say, so a tensor that is merely missing
    would become zeros without a word.

    Raises:
        CheckpointError: names the tensor.
    """
    expected, dtypes = dict(_expected(source)), source.shards.dtypes
    for name, shape in expected.items():
        if not source.has(name):
            bare = name.removeprefix("model.")
            other = f" ({bare} is there: it was saved without its LM head)" if bare != name and source.has(bare) else ""
            raise CheckpointError(
                f"{source.folder}: lacks {name}, which its config.json asks for{other}; save the model again, as a "
                "causal language model"
            )
        if source.shapes[name] != shape:
            raise CheckpointError(
                f"{source.folder}: {name} is {source.shapes[name]}, its config.json says {shape}; save the model again"
            )
        if not dtypes[name].is_floating_point:
            raise CheckpointError(
                f"{source.folder}: {name} is stored as {dtypes[name]} where a weight is a float: quantised "
                "or damaged; fetch the model again"
            )
    extra = [
        name
        for name, shape in source.shapes.items()
        if name not in expected and name != "lm_head.weight" and not is_computed(name, shape)
    ]
    if extra:
        raise CheckpointError(
            f"{source.folder}: {len(extra):,} tensors have no place in the {source.family} that config.json describes, "
            f"first {extra[0]}; config.json lacks a setting (e.g. attention_bias=true), or the weights are another "
            "model's"
        )


def _expected(source: ModelFolder) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, size, vocabulary = source.hidden, source.head_dim, int(source.config["vocab_size"])
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    yield "model.norm.weight", (hidden,)
    if not source.tied:
        yield "lm_head.weight", (vocabulary, hidden)
    for index, layer in enumerate(source.layers):
        start = f"model.layers.{index}"
        shapes = projections(source, layer.width, layer.heads, layer.kv_heads)
        for name, shape in shapes.items():
            yield f"{start}.{name}.weight", shape
            if name in source.biased or name in layer.added_bias:
                yield f"{start}.{name}.bias", shape[:1]
        if layer.heads:
            yield f"{start}.input_layernorm.weight", (hidden,)
            for norm in ("q_norm", "k_norm") if source.family == "qwen3" else ():
                yield f"{start}.self_attn.{norm}.weight", (size,)
        if layer.width:
            yield f"{start}.post_attention_layernorm.weight", (hidden,)


def projections(source: ModelFolder, width: int, heads: int, kv_heads: int) -> dict[str, tuple[int, int]]:
    """The matrices of a layer of these sizes ("mlp.down_proj"), and their shapes; 0: without that submodule."""
    hidden, size = source.hidden, source.head_dim
    queries, keys = heads * size, kv_heads * size
    of_attention = dict(
        zip(_OF_ATTENTION, ((queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)), strict=True)
    )
    of_mlp = dict(zip(_OF_MLP, ((width, hidden), (width, hidden), (hidden, width)), strict=True))
    return {**(of_attention if heads else {}), **(of_mlp if width else {})}


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
