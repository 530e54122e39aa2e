"""Source of an export: a model folder, pruned or dense, with the sizes of each layer.

Tensors are read one at a time.
"""

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
from cfsp.model.tokenizer import check_tokenizer_files
from cfsp.pruned_model.family import PRUNED_PREFIX
from cfsp.pruned_model.names import COMMON_FAMILIES, stock_type
from cfsp.system.names import name_like
from cfsp.weights.fit import is_computed
from cfsp.weights.gguf_header import is_gguf
from cfsp.weights.shards import Shards
from cfsp.weights.source import ModelSource, locate

#: Keys that pruning adds to config.json of the base architecture.
_PRUNED_KEYS = ("per_layer_config", "allow_global_per_layer_attribute_access", "added_bias", "auto_map")
_ATTENTION_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP_PROJECTIONS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
#: Family -> projections that always have a bias.
_ALWAYS_BIASED: Mapping[str, tuple[str, ...]] = {"qwen2": _ATTENTION_PROJECTIONS[:3]}
#: Family -> key of config.json -> projections that have a bias where the key is true.
_BIASED_BY_KEY: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "llama": {"attention_bias": _ATTENTION_PROJECTIONS, "mlp_bias": _MLP_PROJECTIONS},
    "qwen3": {"attention_bias": _ATTENTION_PROJECTIONS},
}

#: Keys of config.json that hold a size, and those of them that may be missing or null.
_SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads",
    "head_dim",
)  # fmt: skip
_NOT_GGUF = (
    ", and model folders are exported; give the folder that it was made of, or prune it (model=local model.path=FILE) "
    "and export OUT/model"
)
_OPTIONAL = ("num_key_value_heads", "head_dim")


@dataclass(frozen=True)
class Layer:
    """Sizes of one layer.

    Attributes:
        width: FFN neurons; 0: no FFN.
        heads: query heads; 0: no attention.
        kv_heads: KV heads; 0: no attention.
        added_bias: projections within the layer ("mlp.down_proj", "self_attn.o_proj") with a bias that the base
            architecture would not give them.
    """

    width: int
    heads: int
    kv_heads: int
    added_bias: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelFolder:
    """Model folder of a LLaMA-like family.

    Attributes:
        source: the model as it was located.
        family: model_type of the base architecture: llama, mistral, qwen2 or qwen3.
        config: config.json of the base architecture, without the keys that pruning added; its intermediate_size and
            head counts are the global ones.
        layers: sizes of each layer.
        shards: the safetensors files.
        dtype: dtype of the stored tensors.
        shapes: name -> shape of the stored tensors.
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
        """Return the path of the folder."""
        return self.source.folder

    @property
    def hidden(self) -> int:
        """Return the hidden size."""
        return int(self.config["hidden_size"])

    @property
    def head_dim(self) -> int:
        """Return the size of an attention head."""
        return int(self.config.get("head_dim") or self.hidden // self.config["num_attention_heads"])

    @property
    def tied(self) -> bool:
        """Return whether the LM head is the embedding: config.json says so, and no head is stored."""
        return bool(self.config.get("tie_word_embeddings")) and not self.has("lm_head.weight")

    @property
    def biased(self) -> tuple[str, ...]:
        """Return the projections ("mlp.down_proj") that the base architecture gives a bias in every layer."""
        by_key = _BIASED_BY_KEY.get(self.family, {})
        stated = tuple(name for key, names in by_key.items() if self.config.get(key) for name in names)
        return (*_ALWAYS_BIASED.get(self.family, ()), *stated)

    @property
    def dense(self) -> bool:
        """Return whether the folder is one of the base architecture that cfsp has not pruned."""
        stock = self.source.config.get("model_type") == self.family
        return stock and self.source.state in (None, "dense")

    @property
    def uniform(self) -> bool:
        """Return whether all layers have equal sizes, and nothing in them is missing or added."""
        first = self.layers[0]
        return first.width > 0 and first.heads > 0 and not first.added_bias and set(self.layers) == {first}

    def read(self, name: str) -> Tensor:
        """Read a tensor as it is stored, on the CPU.

        Args:
            name: full name, e.g. ``model.layers.0.mlp.up_proj.weight``.
        """
        return self.shards.read(name)

    def has(self, name: str) -> bool:
        """Return whether a tensor of this full name is stored."""
        return name in self.shapes


def read_folder(path: str | Path) -> ModelFolder:
    """Read the structure and the headers of a model folder.

    Args:
        path: model folder, or the OUT of a run, whose ``model`` is then read.

    Raises:
        CheckpointError: the folder is missing, incomplete or damaged.
        UnsupportedModelError: no export knows the family.
    """
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    if is_gguf(folder):
        raise CheckpointError(f"path={path}: this is a GGUF file{_NOT_GGUF}")
    if not folder.is_dir():
        raise CheckpointError(
            f"path={path}: no such folder; give a model folder, or the folder of a run that saved one"
        )
    check_tokenizer_files(folder, f"path={path}")
    source = locate(ModelSection(name=name_like(folder.name), path=str(folder.resolve())))
    if source.gguf is not None:
        raise CheckpointError(f"path={path}: the model there is a GGUF file, {source.gguf.file}{_NOT_GGUF}")
    return read_source(source)


def read_source(source: ModelSource) -> ModelFolder:
    """Read the structure and the headers of a model that was located.

    Raises:
        CheckpointError: as :func:`read_folder`.
        UnsupportedModelError: as :func:`read_folder`.
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
    _check_kinds(source)
    per_layer = {int(index): entry for index, entry in (source.config.get("per_layer_config") or {}).items()}
    added = {int(index): tuple(names) for index, names in (source.config.get("added_bias") or {}).items()}
    config = {key: copy.deepcopy(value) for key, value in source.config.items() if key not in _PRUNED_KEYS}
    config["model_type"] = family
    if model_type.startswith(PRUNED_PREFIX):
        config["architectures"] = [name.removeprefix("Pruned") for name in config.get("architectures") or []]
    if not model_type.startswith(PRUNED_PREFIX) and (per_layer or added):
        # The stock class would ignore these keys, build whole layers and fill missing tensors with random weights.
        key = "per_layer_config" if per_layer else "added_bias"
        raise UnsupportedModelError(
            f"{source.origin}: config.json has {key} beside model_type={model_type}, whose layers are all alike; save "
            f"the model with cfsp, as {PRUNED_PREFIX}{family}, or take {key} out"
        )
    layers = tuple(_layer(config, per_layer.get(n, {}), added.get(n, ())) for n in range(config["num_hidden_layers"]))
    return ModelFolder(source, family, config, layers, shards, getattr(torch, source.stored_dtype), shards.shapes)


def _check_kinds(source: ModelSource) -> None:
    """Refuse values in config.json that are not of the kind that their keys take; only what is read here is looked at.

    Raises:
        CheckpointError: names the key and its value.
    """
    config = source.config
    wrong = [(key, config.get(key)) for key in _SIZES if key not in _OPTIONAL and not _is_size(config.get(key))]
    wrong += [(key, config[key]) for key in _OPTIONAL if config.get(key) is not None and not _is_size(config[key])]
    if not isinstance(config.get("architectures") or [], list) or not all(
        isinstance(name, str) for name in config.get("architectures") or []
    ):
        wrong.append(("architectures", config["architectures"]))
    for key, kind in (("per_layer_config", dict), ("added_bias", list)):
        entries = config.get(key) or {}
        if not isinstance(entries, dict) or not all(str(index).isdecimal() for index in entries):
            wrong.append((key, entries))
            continue
        for index, entry in entries.items():
            if not isinstance(entry, kind):
                wrong.append((f"{key}.{index}", entry))
            elif isinstance(entry, dict):
                sizes = [(f"{key}.{index}.{name}", entry[name]) for name in _SIZES if name in entry]
                wrong += [(name, size) for name, size in sizes if not _is_size(size)]
    if wrong:
        key, value = wrong[0]
        raise CheckpointError(
            f"path={source.origin}: config.json has {key}={str(value)[:60]}, which this key does not take; fetch or "
            "save the model again"
        )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _has_own_head(shards: Shards) -> bool:
    """Return whether an LM head is stored that differs from the embedding; config.json may say otherwise."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    return head in shards and embedding in shards and not shards.equal(head, embedding)


def check_tensors_stored(source: ModelFolder) -> None:
    """Check that every tensor which config.json asks for is stored, in the shape that it says; no weight is read.

    The layers decide what is filled up or left out of an export. Without this check a tensor that is merely missing
    would become zeros without a word.

    Raises:
        CheckpointError: names the tensor.
    """
    expected, dtypes = dict(_expected(source)), source.shards.dtypes
    for name, shape in expected.items():
        if not source.has(name):
            bare_name = name.removeprefix("model.")
            hint = (
                f" ({bare_name} is there: it was saved without its LM head)"
                if bare_name != name and source.has(bare_name)
                else ""
            )
            raise CheckpointError(
                f"{source.folder}: lacks {name}, which its config.json asks for{hint}; save the model again, as a "
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
    unexpected = [
        name
        for name, shape in source.shapes.items()
        if name not in expected and name != "lm_head.weight" and not is_computed(name, shape)
    ]
    if unexpected:
        raise CheckpointError(
            f"{source.folder}: {len(unexpected):,} tensors have no place in the {source.family} that config.json "
            f"describes, first {unexpected[0]}; config.json lacks a setting (e.g. attention_bias=true), or the weights "
            "are another model's"
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
    """Return the shapes of a layer's matrices by name ("mlp.down_proj"); with size 0 the submodule is left out."""
    hidden, size = source.hidden, source.head_dim
    queries, keys = heads * size, kv_heads * size
    attention = dict(
        zip(_ATTENTION_PROJECTIONS, ((queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)), strict=True)
    )
    mlp = dict(zip(_MLP_PROJECTIONS, ((width, hidden), (width, hidden), (hidden, width)), strict=True))
    return {**(attention if heads else {}), **(mlp if width else {})}


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
