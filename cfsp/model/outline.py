"""Structure of a model without its weights, checked against the tensors in its folder."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from cfsp.architecture.supported import other_kind
from cfsp.architecture.views import DecoderView, resolve
from cfsp.errors import CheckpointError, UnsupportedModelError
from cfsp.model.transformers_config import describe_suspect_keys, error_reason, load_config, load_generation_config
from cfsp.weights.fit import check_floats, check_places, fit_of, missing_weights, tied_differently, untie
from cfsp.weights.folder_check import readable_by_transformers
from cfsp.weights.shards import Shards, read_header, weight_files

if TYPE_CHECKING:
    from cfsp.weights.source import ModelSource


def outline(source: ModelSource, *, trust_remote_code: bool = False) -> DecoderView:
    """Return the structure of a model on the meta device, without weights.

    The result is cached, because the runs of a sweep use the same models. So callers must not change it.

    Raises:
        UnsupportedModelError: transformers cannot build the model, or its blocks are not recognised.
        CheckpointError: the weights in the folder do not belong to this architecture.
    """
    return _resolve_outline(source, trust_remote_code)


@lru_cache(maxsize=4)
def _resolve_outline(source: ModelSource, trust_remote_code: bool) -> DecoderView:
    try:
        return resolve(_checked_outline(source, trust_remote_code).model)
    except UnsupportedModelError as error:
        text = str(error)
        raise UnsupportedModelError(text if source.origin in text else f"model.path={source.origin}: {text}") from error


@dataclass(frozen=True)
class _CheckedOutline:
    """A model on the meta device that agrees with the tensors in its folder.

    Attributes:
        model: the model.
        untied: True if the LM head is not tied to the embedding although config.json says so.
        notes: sentences for the user about such differences.
    """

    model: Any
    untied: bool = False
    notes: tuple[str, ...] = ()


@lru_cache(maxsize=4)
def _checked_outline(source: ModelSource, trust_remote_code: bool) -> _CheckedOutline:
    """Build the model without weights and compare it with the headers of the weights in the folder.

    Raises:
        UnsupportedModelError: transformers cannot build the model.
        CheckpointError: the weights in the folder do not belong to this architecture.
    """
    config = load_config(source, trust_remote_code=trust_remote_code)
    load_generation_config(source)
    model = _build_model(source, config, trust_remote_code)
    if not any(source.folder.glob("*.safetensors")):  # cfsp inspect accepts a folder with only config.json
        return _CheckedOutline(model)
    whole = model if source.part == "whole" else _build_vision_language_model(source, trust_remote_code)
    pairs = _compare_with_headers(source, whole, sizes=source.part == "whole")
    if source.part != "whole" and pairs == [] and getattr(config, "tie_word_embeddings", None) != _is_tied(whole):
        config.tie_word_embeddings = _is_tied(whole)  # the whole model decides, not the nested configuration
        model = _build_model(source, config, trust_remote_code)
    if not pairs:
        return _CheckedOutline(model)
    first, other = pairs[0]
    untie(config)
    model = _build_model(source, config, trust_remote_code)
    if source.part == "whole" and _compare_with_headers(source, model, sizes=True):
        raise CheckpointError(
            f"model.path={source.origin}: {first} and {other} differ, and {type(model).__name__} holds them in one "
            "parameter; the folder's config.json and safetensors do not belong together"
        )
    note = (
        f"{first} and {other} differ, so the LM head is one of its own, although config.json says "
        "tie_word_embeddings=true; folders that are written say false"
    )
    return _CheckedOutline(model, untied=True, notes=(note,))


def _build_model(source: ModelSource, config: Any, trust_remote_code: bool) -> Any:
    """Build the causal language model of ``config`` on the meta device."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a configuration that contradicts itself can fail anywhere in the model's code
        if kind := other_kind(config):
            raise UnsupportedModelError(
                f"model.path={source.origin}: {kind}; decoder-only language models can be pruned"
            ) from error
        raise UnsupportedModelError(
            f"model.path={source.origin}: not a causal language model that transformers builds "
            f"({error_reason(error)}){describe_suspect_keys(source.config, error)}"
        ) from error


def _build_vision_language_model(source: ModelSource, trust_remote_code: bool) -> Any:
    """Build the vision-language model of a folder on the meta device."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(
            readable_by_transformers(source.folder), trust_remote_code=trust_remote_code
        )
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # as for the language model alone
        raise UnsupportedModelError(
            f"model.path={source.origin}: not a vision-language model that transformers builds ({error_reason(error)})"
        ) from error


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def config_corrections(source: ModelSource, *, trust_remote_code: bool = False) -> tuple[str, ...]:
    """Return sentences about values of config.json that the tensors in the folder contradict; the tensors decide."""
    return _checked_outline(source, trust_remote_code).notes


def corrected_config(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """Return the transformers configuration of a model, corrected where the tensors contradict config.json.

    A head that is stored with other values than the embedding is not tied, even if config.json says so. With the
    corrected configuration, later steps (saving, evaluation) do not tie it.
    """
    config = load_config(source, trust_remote_code=trust_remote_code)
    checked = _checked_outline(source, trust_remote_code)
    if source.part != "whole" and hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = checked.model.config.tie_word_embeddings
    if checked.untied:
        untie(config)
    return config


def _compare_with_headers(source: ModelSource, model: Any, *, sizes: bool) -> list[tuple[str, str]]:
    """Compare names, dtypes and shapes in the safetensors headers with those of a model.

    Values are read only if the model ties two stored tensors.

    Args:
        source: the model folder.
        model: the model on the meta device.
        sizes: compare shapes too, and check that no weight is missing.

    Returns:
        The pairs of stored names that the model ties although their tensors differ.

    Raises:
        CheckpointError: the folder and the model do not belong together.
    """
    where, problem = f"model.path={source.origin}", "the folder's config.json and safetensors do not belong together"
    entries = {name: entry for file in weight_files(source.folder) for name, entry in read_header(file)[0].items()}
    stored = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, shape in expected.items():
        if sizes and stored.get(name, shape) != shape:
            raise CheckpointError(f"{where}: {name} is {list(stored[name])}, config.json says {list(shape)}; {problem}")
    try:
        fit = fit_of(model, stored)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}; {problem}") from error
    missing = missing_weights(model, fit) if sizes else []
    if missing:
        raise CheckpointError(f"{where}: {len(missing)} weights are missing, first {missing[0]}; {problem}")
    check_places(fit, where)
    check_floats(model, fit, {name: entry["dtype"] for name, entry in entries.items()}, where)
    return tied_differently(model, fit, Shards(source.folder))
