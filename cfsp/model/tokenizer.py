"""Loading of the tokenizer of a model folder."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

from cfsp.errors import CheckpointError, ConfigError
from cfsp.model.transformers_config import error_reason
from cfsp.system.reading import read_json
from cfsp.weights.folder_check import readable_by_transformers, tokenizer_code

if TYPE_CHECKING:
    from pathlib import Path

    from cfsp.weights.source import ModelSource

#: Files of a tokenizer that hold a JSON object each.
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model folder.

    Each call returns a new object, because callers may change its padding.

    Raises:
        ConfigError: the tokenizer needs code that may not run.
        CheckpointError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    if not trust_remote_code and tokenizer_code(source.folder):
        raise ConfigError(
            f"model.path={source.origin}: the tokenizer brings its own Python code (auto_map in its settings); "
            "to run it set model.trust_remote_code=true"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            readable_by_transformers(source.folder), trust_remote_code=trust_remote_code
        )
        tokenizer("Once upon a time", truncation=True)  # wrong settings fail here instead of during calibration
        tokenizer.content_fingerprint = source.fingerprint  # :func:`cfsp.data.text.tokenise`
        tokenizer.declared_ids = _special_ids(source)  # :func:`cfsp.evaluation.harness.with_special_tokens`
        return tokenizer
    except RecursionError as error:
        raise CheckpointError(
            f"model.path={source.origin}: a JSON file of the tokenizer is nested too deep; fetch the model again"
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"model.path={source.origin}: the folder has no tokenizer that transformers loads "
            f"({_reason(error, source)}); copy the tokenizer files there"
        ) from error


def check_tokenizer_files(folder: Path, label: str) -> None:
    """Refuse tokenizer files that hold no JSON object; exports copy them without loading them.

    Args:
        folder: a model folder.
        label: name of the folder in messages.

    Raises:
        CheckpointError: a file holds no JSON object; the message names it.
    """
    for name in _FILES:
        file = folder / name
        if (file.exists() or file.is_symlink()) and not isinstance(read_json(file, f"{label}: {name}"), dict):
            raise CheckpointError(f"{label}: {name} holds no object; copy the tokenizer files there again")


def _reason(error: Exception, source: ModelSource) -> str:
    """Return why transformers could not load a tokenizer; for errors of Python's own types, name the files."""
    check_tokenizer_files(source.folder, f"model.path={source.origin}")
    if isinstance(error, TypeError | AttributeError | LookupError | OverflowError):
        present = [name for name in _FILES if (source.folder / name).is_file()]
        return f"a value in {' or '.join(present) or 'its files'} is of a kind that transformers does not take there"
    return error_reason(error)


def _special_ids(source: ModelSource) -> dict[str, int]:
    """Return the ids of BOS and EOS in generation_config.json or config.json; of several ids, the first."""
    stated = dict(source.config)
    with contextlib.suppress(OSError, ValueError):
        generation = json.loads((source.folder / "generation_config.json").read_text(encoding="utf-8"))
        stated |= {key: value for key, value in generation.items() if value is not None}
    ids: dict[str, int] = {}
    for name in ("bos", "eos"):
        value = stated.get(f"{name}_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            ids[name] = value
    return ids
