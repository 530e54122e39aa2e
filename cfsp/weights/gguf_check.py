"""Check of the metadata of a GGUF file against the format and against its own tensors.

transformers' reader puts the default of the class in the place of a setting that is missing, takes values of any type,
and builds as many blocks as are asked for. So every setting that decides what the model computes is checked here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from cfsp.errors import CheckpointError, printable
from cfsp.weights.gguf_header import ArrayLength, GgufHeader

_REMEDY = "the file is damaged or was converted wrongly; fetch it again"
#: Settings without which llama.cpp does not load a file.
_COUNTS = ("block_count", "embedding_length", "context_length")
_SIZES = ("attention.key_length", "attention.value_length", "rope.dimension_count", "vocab_size")
#: Sizes of which some architectures state one for each block.
_BLOCK_SIZES = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
_EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
#: Longest context that a file may state; published models have at most 10 million.
_MAX_CONTEXT = 1 << 27
_BLOCK = re.compile(r"blk\.(\d+)\.")
#: Parts of the tokenizer -> what they must be.
_TEXTS = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")
_NUMBERS = ("tokenizer.ggml.token_type", "tokenizer.ggml.scores")


def check_metadata(header: GgufHeader, where: str) -> None:
    """Refuse metadata that no file has, and metadata that contradict the tensors.

    Args:
        header: header of the file.
        where: name of the file in messages.

    Raises:
        CheckpointError: names the key, its value and what is wrong with it.
    """
    prefix, metadata = f"{header.architecture}.", header.metadata
    needed = _needed(header.architecture)
    for name in (*_COUNTS, *_SIZES, *_BLOCK_SIZES, *_EPSILONS, "rope.freq_base"):
        key = prefix + name
        if key in metadata:
            _refuse(where, key, metadata[key], _problem(name, metadata[key]))
        elif name in needed:
            raise CheckpointError(
                f"{where}: lacks {key}, for which transformers' reader would take a default; {_REMEDY}"
            )
    _check_tensors(header, where)
    _check_tokenizer(header, where)


def _refuse(where: str, key: str, value: Any, problem: str | None) -> None:
    if problem is not None:
        shown = f"an array of {value:,}" if isinstance(value, ArrayLength) else printable(str(value))[:60] or "''"
        raise CheckpointError(f"{where}: {key}={shown}: {problem}; {_REMEDY}")


def _needed(architecture: str) -> set[str]:
    """Return the settings that transformers' reader takes from the file, without which it takes a default."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    mapping: Mapping[str, Any] = {name.replace("_", ""): keys for name, keys in GGUF_CONFIG_MAPPING.items()}
    known = mapping.get(architecture.replace("_", "").replace("-", ""), ())
    return {*_COUNTS, "attention.head_count", *_EPSILONS} & set(known)


def _problem(name: str, value: Any) -> str | None:
    """Return what is wrong with the value of a setting; None: nothing."""
    if name in _EPSILONS:
        return None if isinstance(value, float) and 0 < value < 1 else "a number between 0 and 1 is needed, e.g. 1e-05"
    if name == "rope.freq_base":
        fits = type(value) in (int, float) and math.isfinite(value) and value >= 1
        return None if fits else "a number from 1 is needed, e.g. 10000"
    if name in _BLOCK_SIZES and isinstance(value, list) and value:  # a block without attention or FFN has 0
        return None if all(entry == 0 or _is_size(entry) for entry in value) else "whole numbers are needed"
    if not _is_size(value):
        return "a whole number from 1 is needed"
    return f"more than {_MAX_CONTEXT:,} positions" if name == "context_length" and value > _MAX_CONTEXT else None


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _check_tensors(header: GgufHeader, where: str) -> None:
    """Refuse counts in the metadata that are not those of the tensors."""
    blocks = {int(match[1]) for tensor in header.tensors if (match := _BLOCK.match(tensor.name))}
    embedding = next((tensor for tensor in header.tensors if tensor.name == "token_embd.weight"), None)
    # A block of deci may have neither attention nor FFN, and so no tensors.
    facts = [("block_count", len(blocks), "blocks")] if blocks and header.architecture != "deci" else []
    if embedding is not None and len(embedding.shape) == 2:
        facts.append(("embedding_length", embedding.shape[1], "values in a row of token_embd.weight"))
    for name, held, unit in facts:
        key = f"{header.architecture}.{name}"
        stated = header.metadata.get(key, held)
        _refuse(where, key, stated, None if stated == held else f"the file holds {held:,} {unit}")


def _check_tokenizer(header: GgufHeader, where: str) -> None:
    """Refuse parts of the tokenizer of another kind than the format has, which the reader meets in Python's words."""
    metadata = header.metadata
    for key in ("tokenizer.ggml.model", "tokenizer.ggml.tokens"):
        if key not in metadata:
            raise CheckpointError(f"{where}: has no {key}, so it brings no tokenizer; give a file with its vocabulary")
    named = isinstance(metadata["tokenizer.ggml.model"], str)
    problem = None if named else "the name of a tokenizer is needed, e.g. gpt2"
    _refuse(where, "tokenizer.ggml.model", metadata["tokenizer.ggml.model"], problem)
    if metadata["tokenizer.ggml.model"] == "gpt2" and not metadata.get("tokenizer.ggml.merges"):
        raise CheckpointError(
            f"{where}: has no tokenizer.ggml.merges, without which its tokenizer splits text otherwise; {_REMEDY}"
        )
    for key in _TEXTS:
        value = metadata.get(key)
        fits = value is None or (isinstance(value, ArrayLength) and value.texts)
        _refuse(where, key, value, None if fits else "an array of texts is needed")
    tokens = int(metadata["tokenizer.ggml.tokens"])
    for key in _NUMBERS:
        value = metadata.get(key)
        count = len(value) if isinstance(value, list) else value if isinstance(value, ArrayLength) else -1
        numeric = not isinstance(value, ArrayLength) or not value.texts
        fits = value is None or (numeric and count == tokens)
        _refuse(where, key, value, None if fits else f"a number for each of the {tokens:,} tokens is needed")
    rows = next((tensor.shape[0] for tensor in header.tensors if tensor.name == "token_embd.weight"), tokens)
    fewer = 0 < tokens <= rows
    problem = None if fewer else f"token_embd.weight has {rows:,} rows"
    _refuse(where, "tokenizer.ggml.tokens", metadata["tokenizer.ggml.tokens"], problem)
    for key in ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"):
        value = metadata.get(key)
        fits = value is None or (type(value) is int and 0 <= value < rows)
        _refuse(where, key, value, None if fits else f"a token id below {rows:,} is needed")
