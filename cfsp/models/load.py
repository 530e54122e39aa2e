"""Loading a model and its tokenizer: structure first (meta device), then the weights, refused if incomplete."""

from __future__ import annotations

import contextlib
import json
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cfsp.config import DType, ModelSection
from cfsp.errors import CheckpointError, ConfigError, UnsupportedModelError
from cfsp.models.checkpoint import first_non_finite
from cfsp.models.kinds import other_kind
from cfsp.models.remote_code import PRUNED_PREFIX, pruned_family
from cfsp.models.sample import weight_sample
from cfsp.models.shards import Shards, read_header, weight_files
from cfsp.models.source import ModelSource, locate
from cfsp.models.views import DecoderView, resolve
from cfsp.processes import launched
from cfsp.weights.fit import check_floats, check_places, fit_of, missing_weights, tied_differently, untie, without_place
from cfsp.weights.folder_check import readable_by_transformers, tokenizer_code


def resolve_device(name: str) -> torch.device:
    """``auto`` is cuda where there is one, else cpu; of several processes each takes the GPU of its own number.

    Raises:
        ConfigError: an unknown device, one that this machine lacks, or one for several processes.
    """
    mine = launched()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and mine.several:
        name = f"cuda:{mine.local_rank}"
    elif ":" in name and mine.several:
        raise ConfigError(f"model.device={name}: {mine.count} processes would share it; use model.device=auto")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"model.device={name}: not usable here ({reason}); use model.device=auto or cpu") from error
    return device


def resolve_dtype(name: DType, device: torch.device, source: ModelSource) -> torch.dtype:
    """``auto``: float32 on CPU (fast and exact there), the checkpoint's dtype on an accelerator."""
    if name != "auto":
        return getattr(torch, name)
    return torch.float32 if device.type == "cpu" else getattr(torch, source.stored_dtype)


def load_config(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a model folder; pruned folders need no remote code, cfsp knows their form."""
    from transformers import AutoConfig

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
    except Exception as error:  # transformers' own checks of a configuration raise many types
        raise UnsupportedModelError(
            f"model.path={source.origin}: transformers does not know this model (model_type={model_type or None}): "
            f"{_first_line(error)}"
        ) from error


def _text_config(source: ModelSource, config: Any) -> Any:
    text = config.get_text_config()
    if text is config:
        raise ConfigError(
            f"model.part={source.part}: {source.origin} is no model with a language model inside (model_type="
            f"{config.model_type}); use model.part=whole"
        )
    return text


def outline(source: ModelSource, *, trust_remote_code: bool = False) -> DecoderView:
    """The model's structure on the meta device: shapes without a byte of weights; to be read, not changed.

    The last ones are kept, by the folder and its content: the runs of a sweep ask for the same.

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
        said = str(error)
        raise UnsupportedModelError(said if source.origin in said else f"model.path={source.origin}: {said}") from error


@dataclass(frozen=True)
class _Examined:
    """A model on the meta device, built as its tensors say; untied: against config.json, its head is its own."""

    model: Any
    untied: bool = False
    notes: tuple[str, ...] = ()


@lru_cache(maxsize=4)
def _examined(source: ModelSource, trust_remote_code: bool) -> _Examined:
    """Build the model without weights and compare it with the headers of the weights in the folder.

    Raises:
        UnsupportedModelError, CheckpointError: as :func:`outline`.
    """
    config = load_config(source, trust_remote_code=trust_remote_code)
    model = _built(source, config, trust_remote_code)
    if not any(source.folder.glob("*.safetensors")):  # cfsp inspect takes a folder with config.json alone
        return _Examined(model)
    whole = model if source.part == "whole" else _whole_on_meta(source, trust_remote_code)
    pairs = _compared(source, whole, sizes=source.part == "whole")
    if source.part != "whole" and pairs == [] and getattr(config, "tie_word_embeddings", None) != _is_tied(whole):
        config.tie_word_embeddings = _is_tied(whole)  # what the whole model does, not its inner configuration
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
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a configuration that contradicts itself fails in any place of the model's code
        if kind := other_kind(config):
            raise UnsupportedModelError(
                f"model.path={source.origin}: {kind}; decoder-only language models can be pruned"
            ) from error
        raise UnsupportedModelError(
            f"model.path={source.origin}: not a causal language model that transformers builds ({_first_line(error)})"
        ) from error


def _whole_on_meta(source: ModelSource, trust_remote_code: bool) -> Any:
    """The model that a language model is a part of."""
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
            f"model.path={source.origin}: not a vision-language model that transformers builds ({_first_line(error)})"
        ) from error


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def changed_by_tensors(source: ModelSource, *, trust_remote_code: bool = False) -> tuple[str, ...]:
    """Sentences on what the tensors in the folder say against its config.json, which is followed; none is usual."""
    return _examined(source, trust_remote_code).notes


def decided_config(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """The configuration that the model is built from: config.json, and where the tensors differ from it, the tensors.

    A head that is stored with other values than the embedding is not tied, whatever config.json says; then nothing
    that is done with the model later (saving, an evaluation) ties it.
    """
    config = load_config(source, trust_remote_code=trust_remote_code)
    examined = _examined(source, trust_remote_code)
    if source.part != "whole" and hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = examined.model.config.tie_word_embeddings
    if examined.untied:
        untie(config)
    return config


def _compared(source: ModelSource, model: Any, *, sizes: bool) -> list[tuple[str, str]]:
    """Compare names, dtypes and shapes in the safetensors headers with the model's; returns what it wrongly ties.

    A tensor is read only where the model ties two that are stored.

    Args:
        sizes: compare shapes too, and see that nothing is missing.
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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder, a new one each time: what uses it may change it (its padding)."""
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
        tokenizer.of_content = source.fingerprint  # :func:`cfsp.data.text.tokenise`
        tokenizer.stated_ids = _special_ids(source)  # :func:`cfsp.evaluate.harness.with_special_tokens`
        return tokenizer
    except RecursionError as error:
        raise CheckpointError(
            f"model.path={source.origin}: a JSON file of the tokenizer is nested too deep; fetch the model again"
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"model.path={source.origin}: the folder has no tokenizer that transformers loads "
            f"({type(error).__name__}: {_first_line(error)}); copy the tokenizer files there"
        ) from error


def _special_ids(source: ModelSource) -> dict[str, int]:
    """The ids of BOS and EOS that generation_config.json or config.json state; of several EOS the first."""
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


def load_model(
    source: ModelSource, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> nn.Module:
    """Load the weights, in eval mode.

    Raises:
        CheckpointError: weights are missing, of the wrong shape, unreadable, or not finite.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = decided_config(source, trust_remote_code=trust_remote_code)
    whole = source.part == "whole"
    try:
        loaded: Any = (AutoModelForCausalLM if whole else AutoModelForImageTextToText).from_pretrained(
            readable_by_transformers(source.folder),
            config=config if whole else None,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"model.path={source.origin}: the weights cannot be loaded ({_first_line(error)}); fetch the model again"
        ) from error
    model, report = loaded
    wrong = [*report.get("missing_keys", ()), *report.get("mismatched_keys", ())]
    if wrong:
        raise CheckpointError(
            f"model.path={source.origin}: {len(wrong)} weights are missing or of another shape, first {wrong[0]}; "
            "the folder's config.json and safetensors do not belong together"
        )
    lost = without_place(model, report.get("unexpected_keys", ()))  # the headers said so before, of the same names
    if lost:
        raise CheckpointError(
            f"model.path={source.origin}: {len(lost)} stored tensors have no place in {type(model).__name__}, first "
            f"{lost[0]}; the folder's config.json and safetensors do not belong together"
        )
    if not whole:
        model = language_model_of(model, config, source)
    name = first_non_finite(model)
    if name is not None:
        raise CheckpointError(
            f"model.path={source.origin}: {name} holds NaN or infinite values as {dtype}; the checkpoint is damaged "
            "(fetch it again), or its values need model.dtype=float32"
        )
    model = model.to(device).eval()
    with contextlib.suppress(UnsupportedModelError):  # then it can be evaluated, not pruned
        model._cfsp_loaded = (source.fingerprint, weight_sample(resolve(model)))
    return model


def language_model_of(model: Any, config: Any, source: ModelSource) -> Any:
    """The causal language model of ``config`` with the decoder and the head that are inside ``model``.

    Raises:
        UnsupportedModelError: there is no such decoder in it.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        alone: Any = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    inner = [module for module in model.modules() if type(module) is type(alone.base_model)]
    head = model.get_output_embeddings()
    if len(inner) != 1 or head is None:
        raise UnsupportedModelError(
            f"model.part={source.part}: {type(model).__name__} holds {len(inner)} decoders of the class "
            f"{type(alone.base_model).__name__}; save its language model as a folder of its own"
        )
    setattr(alone, alone.base_model_prefix, inner[0])
    alone.set_output_embeddings(head)
    inner[0].config = alone.config
    if (source.folder / "generation_config.json").is_file():
        alone.generation_config = model.generation_config
    return alone


def load(path: str | Path, *, dtype: DType = "auto", device: str = "auto") -> tuple[Any, Any]:
    """Load any model folder or hub id, pruned ones of any form included: ``model, tokenizer = cfsp.load(path)``.

    Raises:
        CheckpointError: the folder is missing, incomplete or damaged.
    """
    source = locate(ModelSection(name=Path(path).name, path=str(path)))
    where = resolve_device(device)
    model = load_model(source, dtype=resolve_dtype(dtype, where, source), device=where)
    return model, load_tokenizer(source)
