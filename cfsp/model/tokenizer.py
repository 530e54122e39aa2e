"""Loading of the tokenizer of a model folder."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

from cfsp.errors import CheckpointError, ConfigError
from cfsp.model.transformers_config import first_line
from cfsp.system.reading import read_json
from cfsp.weights.folder_check import readable_by_transformers, tokenizer_code

if TYPE_CHECKING:
    from pathlib import Path

    from cfsp.weights.source import ModelSource

#: Files of a tokenizer that hold a JSON object each.
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a model folder, a new object each time, because callers may change its padding.

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
        tokenizer("Once upon a time", truncation=True)  # settings that are wrong are met here, not in calibration
        tokenizer.of_content = source.fingerprint  # :func:`cfsp.data.text.tokenise`
        tokenizer.stated_ids = _special_ids(source)  # :func:`cfsp.evaluation.harness.with_special_tokens`
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
    """Refuse a tokenizer whose files are no JSON objects, for who copies them without loading them.

    Raises:
        CheckpointError: such a file is there; it is named.
    """
    for name in _FILES:
        file = folder / name
        if (file.exists() or file.is_symlink()) and not isinstance(read_json(file, f"{label}: {name}"), dict):
            raise CheckpointError(f"{label}: {name} holds no object; copy the tokenizer files there again")


def _reason(error: Exception, source: ModelSource) -> str:
    """Return why transformers could not load a tokenizer; errors of Python itself are told by the file at fault."""
    check_tokenizer_files(source.folder, f"model.path={source.origin}")
    if isinstance(error, TypeError | AttributeError | LookupError | OverflowError):
        present = [name for name in _FILES if (source.folder / name).is_file()]
        return f"a value in {' or '.join(present) or 'its files'} is of a kind that transformers does not take there"
    return first_line(error)


def _special_ids(source: ModelSource) -> dict[str, int]:
    """Return the ids of BOS and EOS in generation_config.json or config.json; the first where there are several."""
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
