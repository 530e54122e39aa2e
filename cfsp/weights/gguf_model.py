"""Model folders from GGUF files: configuration and tokenizer first, the dequantised weights when they are needed.

Everything is read by transformers' own GGUF reader, and what that reader leaves out is added or refused here: ids of
the special tokens, scaling of RoPE, tensors without a place, settings that the reader does not know. The rest of cfsp
then works with a model folder like any other. Weights are float32, so that no value of the file is changed, or float16
or bfloat16 where the file holds that type and nothing is lost.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cfsp.errors import CheckpointError, UnsupportedModelError
from cfsp.system.atomic import naming
from cfsp.system.memory import available
from cfsp.weights.atomic_folder import atomic_folder
from cfsp.weights.gguf_header import GgufHeader
from cfsp.weights.gguf_rope import FACTORS, scaling_in
from cfsp.weights.transformers_noise import line_of, quiet

#: Written last; what was written by another version of this module is written again.
_FORMAT = 1
_MAX_SHARD = "4GB"
#: Keys of an architecture that say nothing about what is computed, or are compared here.
_NEUTRAL = (
    "vocab_size", "rope.dimension_count", "attention.key_length", "attention.value_length", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned", "attention.causal",
    "rope.scaling.attn_factor", "rope.freq_base", "use_parallel_residual", "tensor_data_layout",
)  # fmt: skip


def folder_name(digest: str) -> str:
    """Return the name of the folder for a file of this sha256; another version of transformers gets another folder."""
    from transformers import __version__

    return f"{digest[:16]}-{_FORMAT}-{__version__}"


def write_outline(header: GgufHeader, folder: Path, where: str) -> None:
    """Write configuration, tokenizer and licence of a GGUF file as the files of a model folder, without weights.

    Args:
        header: header of the file.
        folder: the folder; an older one is replaced.
        where: name of the file in messages.

    Raises:
        UnsupportedModelError: transformers cannot read this architecture from GGUF.
        CheckpointError: the tokenizer cannot be read, or the folder cannot be written.
    """
    config = config_of(header, where)
    tokenizer = _tokenizer(header, where)
    with atomic_folder(folder) as scratch:
        write_config(config, header, scratch)
        with naming(scratch / "tokenizer.json"):
            tokenizer.save_pretrained(scratch)
        licence = header.metadata.get("general.license")
        if isinstance(licence, str) and licence.strip():
            (scratch / "README.md").write_text(f"---\nlicense: {json.dumps(licence.strip())}\n---\n", encoding="utf-8")


def write_config(config: Any, header: GgufHeader, folder: Path) -> None:
    """Write config.json and generation_config.json, without a trace of the quantiser.

    Args:
        config: the configuration of :func:`config_of`.
        header: header of the file.
        folder: an existing folder.
    """
    values = json.loads(config.to_json_string())
    for key in ("_name_or_path", "_model_name_or_path", "quantization_config"):
        values.pop(key, None)
    values = _shortest_floats(values)
    values["dtype"] = header.dtype
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    ids = {key: values[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if values.get(key) is not None}
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")


def _shortest_floats(value: Any) -> Any:
    """Write each number that came from a float32 with as few digits as give that float32: 1e-05, not 9.99999975e-06."""
    if isinstance(value, dict):
        return {key: _shortest_floats(entry) for key, entry in value.items()}
    return float(str(np.float32(value))) if isinstance(value, float) and np.float32(value) == value else value


def config_of(header: GgufHeader, where: str) -> Any:
    """Return the transformers configuration of a GGUF file.

    Raises:
        UnsupportedModelError: transformers cannot read this architecture from GGUF, or its reader leaves out a setting
            that changes what the model computes.
    """
    from transformers import AutoConfig

    supported = _architectures()
    if header.architecture not in supported:
        raise UnsupportedModelError(
            f"{where}: transformers cannot read the architecture {header.architecture} from GGUF; it reads "
            f"{', '.join(supported)}; give the model as a folder of safetensors"
        )
    try:
        with quiet():
            config = AutoConfig.from_pretrained(str(header.file.parent), gguf_file=header.file.name)
    except Exception as error:  # the reader trusts the metadata, so anything can fail
        raise UnsupportedModelError(
            f"{where}: transformers' GGUF reader cannot make a configuration of the metadata ({line_of(error)}); give "
            "the model as a folder of safetensors"
        ) from error
    config.architectures = config.architectures or [_class_name(config, where)]
    _set_special_ids(config, header)
    _set_sizes(config, header, where)
    _set_rope(config, header, where)
    return config


def unread_settings(header: GgufHeader) -> tuple[str, ...]:
    """Return the settings of the architecture that transformers' reader does not know, as ``key=value``."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    mapping: Mapping[str, Any] = GGUF_CONFIG_MAPPING
    read_keys = mapping.get(header.architecture)
    if read_keys is None:  # architectures with a reader of their own, or another name in transformers
        return ()
    prefix = f"{header.architecture}."
    return tuple(
        f"{key}={value}"
        for key, value in header.metadata.items()
        if key.startswith(prefix)
        and key.removeprefix(prefix) not in (*read_keys, *_NEUTRAL)
        and value not in (0, False)
    )


def write_weights(header: GgufHeader, outline: Path, folder: Path, where: str) -> None:
    """Write the folder ``outline`` with the dequantised weights of the file.

    Args:
        header: header of the file.
        outline: folder of :func:`write_outline`.
        folder: the folder; an older one is replaced.
        where: name of the file in messages.

    Raises:
        CheckpointError: the weights cannot be read, are incomplete, do not fit into memory, or cannot be written.
    """
    needed, free = header.parameters * 4, available(torch.device("cpu"))
    if needed > 0.9 * free:
        raise CheckpointError(
            f"{where}: dequantised weights take {needed / 1e9:.1f} GB of memory once, {free / 1e9:.1f} GB are free; "
            "make room, or give the model as a folder of safetensors"
        )
    model = _loaded(header, outline, where)
    with atomic_folder(folder) as scratch:
        with quiet():
            model.save_pretrained(scratch, max_shard_size=_MAX_SHARD)
        for file in outline.iterdir():  # config.json too: save_pretrained writes one with its own ideas
            (scratch / file.name).write_bytes(file.read_bytes())
        config = json.loads((scratch / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = str(model.dtype).removeprefix("torch.")
        (scratch / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _loaded(header: GgufHeader, outline: Path, where: str) -> Any:
    """Return the model with the weights of the file, in the dtype that the file states or float32.

    Raises:
        CheckpointError: weights are missing or have no place.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(outline)
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(header.file.parent), gguf_file=header.file.name, config=config, dtype=torch.float32,
                output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # the reader checks little itself
        raise CheckpointError(
            f"{where}: transformers' GGUF reader cannot load the weights ({line_of(error)}); fetch the file again, or "
            "give the model as a folder of safetensors"
        ) from error
    model, report = loaded
    missing = [*report.get("missing_keys", ()), *report.get("mismatched_keys", ())]
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} weights are missing or of another shape, first {missing[0]}; metadata and "
            "tensors do not belong together"
        )
    lost = [*report.get("unexpected_keys", ())] or _without_place(header, model)
    if lost:
        raise CheckpointError(
            f"{where}: {len(lost)} tensors of the file have no place in {type(model).__name__}, first {lost[0]}; give "
            "the model as a folder of safetensors"
        )
    # The weights are dequantised, so nothing of the quantiser may keep the model from being saved as it is.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    dtype = getattr(torch, header.dtype)
    if dtype != torch.float32 and all(torch.equal(p, p.to(dtype).to(p.dtype)) for p in model.parameters()):
        model = model.to(dtype)
    return model


def _without_place(header: GgufHeader, model: Any) -> list[str]:
    """Return the tensors of the file that transformers' older reader leaves out without a word."""
    from transformers import modeling_gguf_pytorch_utils as reader

    if header.architecture in _own_readers():
        return []
    processor: Any = reader.TENSOR_PROCESSORS.get(header.architecture, reader.TensorProcessor)
    places = reader.get_gguf_hf_weights_map(model, processor(config=model.config.to_dict()))
    names = [tensor.name for tensor in header.tensors if tensor.name != FACTORS]
    return [name for name in names if name not in places and "_exps." not in name]


def _architectures() -> list[str]:
    """Return the architectures that transformers reads from GGUF, in llama.cpp's spelling."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    spelling = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss", "minimax_m2": "minimax-m2"}
    names = {spelling.get(name, name) for name in GGUF_SUPPORTED_ARCHITECTURES} - {"general", "tokenizer"}
    return sorted(names | set(_own_readers()))


def _own_readers() -> tuple[str, ...]:
    """Return the architectures that newer versions of transformers read in another way."""
    try:
        from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    except ImportError:
        return ()
    return tuple(GGUF_CONFIG_ARCHS)


def _class_name(config: Any, where: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if name is None:
        raise UnsupportedModelError(
            f"{where}: model_type={config.model_type} is no causal language model; decoder-only models can be pruned"
        )
    return str(name)


def _set_special_ids(config: Any, header: GgufHeader) -> None:
    """Set the ids of BOS, EOS and padding, for which the reader leaves the defaults of the class."""
    spelling = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}
    for name, key in spelling.items():
        number = header.metadata.get(f"tokenizer.ggml.{key}")
        valid = isinstance(number, int) and 0 <= number < config.vocab_size
        setattr(config, f"{name}_token_id", number if valid else None)


def _set_sizes(config: Any, header: GgufHeader, where: str) -> None:
    """Set the sizes that the reader leaves at the defaults of the class; refuse models that it would read wrongly."""
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    embedding = shapes.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{where}: has no token_embd.weight; it is no whole language model")
    config.vocab_size = embedding[0]
    prefix = header.architecture
    length = header.metadata.get(f"{prefix}.attention.key_length")
    rotated = header.metadata.get(f"{prefix}.rope.dimension_count", length)
    if length is not None and hasattr(config, "head_dim") and prefix not in _own_readers():
        if rotated != length:
            raise UnsupportedModelError(
                f"{where}: its heads have {length} dimensions of which {rotated} are rotated, which transformers' GGUF "
                "reader does not read; give the model as a folder of safetensors"
            )
        config.head_dim = length  # the reader leaves the default of the class for some architectures
    if header.architecture == "llama" and header.metadata.get("llama.expert_count"):
        raise UnsupportedModelError(
            f"{where}: a mixture of experts of the architecture llama (Mixtral), which transformers' GGUF reader takes "
            "for a dense model; give it as a folder of safetensors"
        )


def _set_rope(config: Any, header: GgufHeader, where: str) -> None:
    """Add the scaling of RoPE, which the reader leaves out for every architecture but one."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or header.architecture in ("gpt-oss", *_own_readers()) or "rope_theta" not in rope:
        return
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    config.rope_parameters = rope | scaling_in(header, float(rope["rope_theta"]), head_dim, where)


def _tokenizer(header: GgufHeader, where: str) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    try:
        with quiet(), _alone(header.file) as folder:
            tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), gguf_file=header.file.name)
    except Exception as error:  # the reader checks little itself
        raise CheckpointError(
            f"{where}: transformers' GGUF reader cannot make a tokenizer of the metadata ({line_of(error)}); fetch the "
            "file again, or give the model as a folder of safetensors"
        ) from error
    if header.metadata.get("tokenizer.ggml.pre") == "smollm":  # the reader splits as GPT-2, without the digits
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


@contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """Yield a folder that holds nothing but a link to ``file``, so that no tokenizer beside it is read instead."""
    with tempfile.TemporaryDirectory(prefix="cfsp-gguf-") as scratch:
        (Path(scratch) / file.name).symlink_to(file.resolve())
        yield Path(scratch)
