"""Structure of a model without its weights, compared with the tensors that its folder holds."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from cfsp.architecture.supported import other_kind
from cfsp.architecture.views import DecoderView, resolve
from cfsp.errors import CheckpointError, UnsupportedModelError
from cfsp.model.transformers_config import first_line, load_config, load_generation_config, suspects
from cfsp.weights.fit import check_floats, check_places, fit_of, missing_weights, tied_differently, untie
from cfsp.weights.folder_check import readable_by_transformers
from cfsp.weights.shards import Shards, read_header, weight_files

if TYPE_CHECKING:
    from cfsp.weights.source import ModelSource


def outline(source: ModelSource, *, trust_remote_code: bool = False) -> DecoderView:
    """Return the structure of a model on the meta device, without weights. It must not be changed.

    The last results are kept by folder and content, because the runs of a sweep ask for the same models.

    Raises:
        UnsupportedModelError: transformers cannot build the model, or its blocks are not recognised.
        CheckpointError: the weights in the folder are not those of this architecture.
    """
    return _recognised(source, trust_remote_code)


@lru_cache(maxsize=4)
def _recognised(source: ModelSource, trust_remote_code: bool) -> DecoderView:
    try:
        return resolve(_examined(source, trust_remote_code).model)
    except UnsupportedModelError as error:
        text = str(error)
        raise UnsupportedModelError(text if source.origin in text else f"model.path={source.origin}: {text}") from error


@dataclass(frozen=True)
class _Examined:
    """A model on the meta device, built as the tensors in its folder say.

    Attributes:
        model: the model.
        untied: its LM head is not tied to the embedding, although config.json says so.
        notes: sentences for the user on such differences.
    """

    model: Any
    untied: bool = False
    notes: tuple[str, ...] = ()


@lru_cache(maxsize=4)
def _examined(source: ModelSource, trust_remote_code: bool) -> _Examined:
    """Build the model without weights and compare it with the headers of the weights in the folder.

    Raises:
        UnsupportedModelError: transformers cannot build the model.
        CheckpointError: the weights in the folder are not those of this architecture.
    """
    config = load_config(source, trust_remote_code=trust_remote_code)
    load_generation_config(source)
    model = _built(source, config, trust_remote_code)
    if not any(source.folder.glob("*.safetensors")):  # cfsp inspect takes a folder with config.json alone
        return _Examined(model)
    whole = model if source.part == "whole" else _whole_on_meta(source, trust_remote_code)
    pairs = _compared(source, whole, sizes=source.part == "whole")
    if source.part != "whole" and pairs == [] and getattr(config, "tie_word_embeddings", None) != _is_tied(whole):
        config.tie_word_embeddings = _is_tied(whole)  # the whole model decides, not its inner configuration
        model = _built(source, config, trust_remote_code)
    if not pairs:
        return _Examined(model)
    first, other = pairs[0]
    untie(config)
    model = _built(source, config, trust_remote_code)
    if source.part == "whole" and _compared(source, model, sizes=True):
        raise CheckpointError(
            f"model.path={source.origin}: {first} and {other} differ, and {type(model).__name__} holds them in one "
            "parameter; the folder's config.json and safetensors do not belong together"
        )
    note = (
        f"{first} and {other} differ, so the LM head is one of its own, although config.json says "
        "tie_word_embeddings=true; folders that are written say false"
    )
    return _Examined(model, untied=True, notes=(note,))


def _built(source: ModelSource, config: Any, trust_remote_code: bool) -> Any:
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
            f"({first_line(error)}){suspects(source.config, error)}"
        ) from error


def _whole_on_meta(source: ModelSource, trust_remote_code: bool) -> Any:
    """Build the vision-language model that a language model is a part of, on the meta device."""
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
            f"model.path={source.origin}: not a vision-language model that transformers builds ({first_line(error)})"
        ) from error


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def changed_by_tensors(source: ModelSource, *, trust_remote_code: bool = False) -> tuple[str, ...]:
    """Return sentences on differences between the tensors in the folder, which decide, and its config.json."""
    return _examined(source, trust_remote_code).notes


def decided_config(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """Return the configuration that a model is built from: config.json, corrected by the tensors in the folder.

    A head that is stored with other values than the embedding is not tied, whatever config.json says. The corrected
    configuration keeps later steps (saving, evaluation) from tying it.
    """
    config = load_config(source, trust_remote_code=trust_remote_code)
    examined = _examined(source, trust_remote_code)
    if source.part != "whole" and hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = examined.model.config.tie_word_embeddings
    if examined.untied:
        untie(config)
    return config


def _compared(source: ModelSource, model: Any, *, sizes: bool) -> list[tuple[str, str]]:
    """Compare names, dtypes and shapes in the safetensors headers with those of a model.

    Tensors are read only where the model ties two stored ones.

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
