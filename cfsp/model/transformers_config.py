"""Loading of the transformers configuration of a model folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cfsp.errors import CheckpointError, ConfigError, UnsupportedModelError
from cfsp.pruned_model.family import PRUNED_PREFIX, pruned_family
from cfsp.weights.folder_check import readable_by_transformers

if TYPE_CHECKING:
    from cfsp.weights.source import ModelSource


#: Python type in messages of libraries -> words for the user.
_TYPES = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "list": "a list"}


def load_config(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """Load the transformers configuration of a model folder.

    Folders that cfsp pruned need no remote code.

    Raises:
        ConfigError: the model needs code that may not run, or has no language model inside.
        CheckpointError: a value in config.json cannot be used.
        UnsupportedModelError: transformers does not know the model.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = str(source.config.get("model_type", ""))
    if model_type.startswith(PRUNED_PREFIX):
        pruned_family(model_type.removeprefix(PRUNED_PREFIX))
    elif "auto_map" in source.config and not trust_remote_code:
        raise ConfigError(
            f"model.path={source.origin}: the model brings its own Python code (auto_map in config.json); "
            "to run that code set model.trust_remote_code=true"
        )
    try:
        config = AutoConfig.from_pretrained(
            readable_by_transformers(source.folder), trust_remote_code=trust_remote_code
        )
        return config if source.part == "whole" else _text_config(source, config)
    except ConfigError:
        raise
    except Exception as error:  # the checks in transformers raise many types
        if model_type in CONFIG_MAPPING:
            raise CheckpointError(
                f"model.path={source.origin}: config.json cannot be used (model_type={model_type}): "
                f"{error_reason(error)}{describe_suspect_keys(source.config, error)}; correct the value, or fetch the "
                "file again"
            ) from error
        raise UnsupportedModelError(
            f"model.path={source.origin}: transformers does not know this model (model_type={model_type or None}): "
            f"{error_reason(error)}{describe_suspect_keys(source.config, error)}"
        ) from error


def load_generation_config(source: ModelSource) -> Any:
    """Load the generation_config.json of a model folder; None if there is none.

    Raises:
        CheckpointError: transformers cannot use the file. It would drop it silently from a model in memory, and fail
            elsewhere.
    """
    from transformers import GenerationConfig

    if not (source.folder / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(readable_by_transformers(source.folder))
    except Exception as error:  # transformers' own checks raise many types
        raise CheckpointError(
            f"model.path={source.origin}: generation_config.json cannot be used ({error_reason(error)}); fetch the "
            "file again, or remove it"
        ) from error


def _text_config(source: ModelSource, config: Any) -> Any:
    text = config.get_text_config()
    if text is config:
        raise ConfigError(
            f"model.part={source.part}: {source.origin} is no model with a language model inside (model_type="
            f"{config.model_type}); use model.part=whole"
        )
    return text


def error_reason(error: Exception) -> str:
    """Return the reason of an error in one line for the user.

    Lines such as "Validation error for field ...:" are skipped, because the reason stands in a later line.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in lines if not line.endswith(":")), type(error).__name__)
    reason = re.sub(r"^\w+Error: ", "", reason)
    reason = re.sub(r" doesn't match any type in .*", " is of another type than the key takes", reason)
    # Libraries name Python types and values, but the user wrote JSON.
    expected = re.match(r"Field '(\w+)' expected (\w+), got \w+ \(value: (.*)\)$", reason)
    if expected:
        value = {"None": "null", "True": "true", "False": "false"}.get(expected[3], expected[3][:60])
        reason = f"{expected[1]} is {value}, and {_TYPES.get(expected[2], expected[2])} is expected"
    if re.search(r"by zero$|0.0 cannot be raised to a negative power", reason):
        reason = "it divides by a value that is zero"
    return reason


def describe_suspect_keys(config: Mapping[str, Any], error: Exception) -> str:
    """Return a clause that names the keys of config.json whose value may have caused an error.

    Such a value is the unknown name of a KeyError, or a zero in a division. The clause is empty if there is none.
    """
    if isinstance(error, KeyError):
        wrong: Any = error.args[0] if error.args else None
    elif re.search(r"by (a value that is )?zero|0.0 cannot be raised to a negative power", str(error)):
        wrong = 0
    else:
        return ""
    sections = [config, config["text_config"]] if isinstance(config.get("text_config"), dict) else [config]
    keys = [
        key
        for section in sections
        for key, value in section.items()
        if value == wrong and type(value) is type(wrong) and not key.endswith("_token_id")
    ]
    return f"; see {', '.join(keys[:3])} in config.json" if keys else ""
