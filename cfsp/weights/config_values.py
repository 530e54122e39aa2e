"""Kinds of the values in config.json and generation_config.json, checked before anything reads them.

transformers takes many wrong values without a word and meets them later, in the words of Python. Only keys whose kind
is the same in every architecture are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cfsp.errors import CheckpointError, printable


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _is_token(value: Any) -> bool:
    """Return whether a value is a token id, or a list of them, as LLaMA 3 states its ends of text."""
    return _is_number(value) or (isinstance(value, list) and all(map(_is_number, value)))


_TOKEN = (_is_token, "a token id, e.g. 1, or a list of them")
#: Key -> (whether it takes a value, what it takes). null is taken by every key.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model_type": (lambda value: isinstance(value, str), 'a name, e.g. "llama"'),
    "architectures": (_are_texts, 'a list of class names, e.g. ["LlamaForCausalLM"]'),
    "rope_parameters": (lambda value: isinstance(value, dict), 'an object, e.g. {"rope_theta": 10000.0}'),
    "rope_scaling": (lambda value: isinstance(value, dict), 'an object, e.g. {"rope_type": "linear", "factor": 2.0}'),
    "layer_types": (_are_texts, 'a list of a name for each layer, e.g. ["full_attention"]'),
    "tie_word_embeddings": (lambda value: isinstance(value, bool), "true or false"),
    "text_config": (lambda value: isinstance(value, dict), "an object"),
    "auto_map": (lambda value: isinstance(value, dict), "an object of class names"),
    "bos_token_id": _TOKEN,
    "eos_token_id": _TOKEN,
    "pad_token_id": _TOKEN,
}


def check_values(config: Mapping[str, Any], label: str) -> None:
    """Refuse a value of another kind than its key takes, in a configuration and the text model nested in it.

    Args:
        config: content of config.json or generation_config.json.
        label: name of the file in messages, e.g. ``model.path=FOLDER: config.json``.

    Raises:
        CheckpointError: names the key, its value and what the key takes.
    """
    for prefix, section in (("", config), ("text_config.", config.get("text_config"))):
        if not isinstance(section, Mapping):
            continue
        for key, (takes, kind) in _KINDS.items():
            value = section.get(key)
            if value is not None and not takes(value):
                raise CheckpointError(
                    f"{label} has {prefix}{key}={printable(str(value))[:60]}, where the key takes {kind}; correct it, "
                    "or fetch the model again"
                )
