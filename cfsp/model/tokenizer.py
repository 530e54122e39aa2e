"""Loading of the tokenizer of a model folder."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

from cfsp.errors import CheckpointError, ConfigError
from cfsp.model.transformers_config import first_line
from cfsp.weights.folder_check import readable_by_transformers, tokenizer_code

if TYPE_CHECKING:
    from cfsp.weights.source import ModelSource


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
            f"({first_line(error)}); copy the tokenizer files there"
        ) from error


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
