"""Loading of a model and its tokenizer.

The structure is built on the meta device first. Then the weights are loaded, and refused if they are incomplete.
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cfsp.architecture.views import resolve
from cfsp.architecture.weights import carry
from cfsp.config.sections import DType, ModelSection
from cfsp.errors import CheckpointError, UnsupportedModelError
from cfsp.model.device import resolve_device, resolve_dtype
from cfsp.model.finite import first_non_finite
from cfsp.model.outline import corrected_config
from cfsp.model.streamed import StreamedWeights
from cfsp.model.tokenizer import load_tokenizer
from cfsp.model.transformers_config import error_reason, load_generation_config
from cfsp.model.weight_sample import weight_sample
from cfsp.system.names import name_like
from cfsp.weights.fit import without_place
from cfsp.weights.folder_check import readable_by_transformers
from cfsp.weights.shards import Shards
from cfsp.weights.source import ModelSource, locate, with_weights

if TYPE_CHECKING:
    from cfsp.weights.source import ModelSource


def load_model(
    source: ModelSource, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> nn.Module:
    """Load a model with all its weights, in eval mode.

    Args:
        source: the model.
        dtype: dtype of the weights.
        device: device of the weights.
        trust_remote_code: run Python code that the model folder brings.

    Raises:
        CheckpointError: weights are missing, of the wrong shape, unreadable, or not finite.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    source = with_weights(source)
    config = corrected_config(source, trust_remote_code=trust_remote_code)
    is_text_model = source.part == "whole"
    try:
        loaded: Any = (AutoModelForCausalLM if is_text_model else AutoModelForImageTextToText).from_pretrained(
            readable_by_transformers(source.folder),
            config=config if is_text_model else None,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"model.path={source.origin}: the weights cannot be loaded ({error_reason(error)}); fetch the model again"
        ) from error
    model, report = loaded
    unusable = [*report.get("missing_keys", ()), *report.get("mismatched_keys", ())]
    if unusable:
        raise CheckpointError(
            f"model.path={source.origin}: {len(unusable)} weights are missing or of another shape, first "
            f"{unusable[0]}; the folder's config.json and safetensors do not belong together"
        )
    # The check of the headers usually refuses these before.
    unmatched = without_place(model, report.get("unexpected_keys", ()))
    if unmatched:
        raise CheckpointError(
            f"model.path={source.origin}: {len(unmatched)} stored tensors have no place in {type(model).__name__}, "
            f"first {unmatched[0]}; the folder's config.json and safetensors do not belong together"
        )
    if not is_text_model:
        model = extract_language_model(model, config, source)
    name = first_non_finite(model)
    if name is not None:
        raise CheckpointError(
            f"model.path={source.origin}: {name} holds NaN or infinite values as {dtype}; the checkpoint is damaged "
            "(fetch it again), or its values need model.dtype=float32"
        )
    model = model.to(device).eval()
    with contextlib.suppress(UnsupportedModelError):  # such a model can be evaluated but not pruned
        model._cfsp_loaded = (source.fingerprint, weight_sample(resolve(model)))
    return model


def extract_language_model(model: Any, config: Any, source: ModelSource) -> Any:
    """Return the causal language model inside a vision-language model; both share their weights.

    Args:
        model: the vision-language model.
        config: configuration of its language model.
        source: source of the model, for the message.

    Raises:
        UnsupportedModelError: there is not exactly one such decoder in it, or no head.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        language_model: Any = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    decoders = [module for module in model.modules() if type(module) is type(language_model.base_model)]
    head = model.get_output_embeddings()
    if len(decoders) != 1 or head is None:
        raise UnsupportedModelError(
            f"model.part={source.part}: {type(model).__name__} holds {len(decoders)} decoders of the class "
            f"{type(language_model.base_model).__name__}; save its language model as a folder of its own"
        )
    setattr(language_model, language_model.base_model_prefix, decoders[0])
    language_model.set_output_embeddings(head)
    decoders[0].config = language_model.config
    if (source.folder / "generation_config.json").is_file():
        language_model.generation_config = model.generation_config
    return language_model


def load(
    path: str | Path,
    *,
    dtype: DType = "auto",
    device: str = "auto",
    dequantize: bool = False,
    gguf_file: str | None = None,
) -> tuple[Any, Any]:
    """Load a model, pruned or not, from a folder or the hub.

    Example:
        >>> model, tokenizer = cfsp.load("out/pruned")

    Args:
        path: a model folder, a GGUF file or a hub id.
        dtype: dtype of the weights; auto is float32 on CPU, else the checkpoint's.
        device: device of the model; auto is cuda where there is a GPU, else cpu.
        dequantize: dequantise the weights of a quantised checkpoint to float32, as ``model.dequantize=true`` does.
        gguf_file: name of the GGUF file in a folder or repository that holds several.

    Returns:
        The model in eval mode, and its tokenizer.

    Raises:
        CheckpointError: the folder is missing, incomplete or damaged, or its weights are quantised and ``dequantize``
            is false.
    """
    section = ModelSection(name=name_like(Path(path).name), path=str(path), dequantize=dequantize, gguf_file=gguf_file)
    source = locate(section)
    torch_device = resolve_device(device)
    model = load_model(source, dtype=resolve_dtype(dtype, torch_device, source), device=torch_device)
    return model, load_tokenizer(source)


def load_streamed(
    source: ModelSource, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> Any:
    """Load a model in eval mode whose weights stay on disk and are read block by block.

    Args:
        source: the model.
        dtype: dtype that the model computes in.
        device: device that it computes on.
        trust_remote_code: run Python code that the model folder brings.

    Raises:
        CheckpointError: weights are missing.
        UnsupportedModelError: this architecture cannot be streamed.
    """
    from transformers import AutoModelForCausalLM

    source = with_weights(source)
    config = corrected_config(source, trust_remote_code=trust_remote_code)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    generation = load_generation_config(source)
    if generation is not None:
        model.generation_config = generation
    _fill_buffers(model, device)
    model.eval().requires_grad_(False)
    weights = StreamedWeights(model, Shards(source.folder), dtype, device)
    weights.check_rest()
    carry(model, weights)
    return model


def _fill_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers that no checkpoint holds (e.g. rotary frequencies) with the model's own initialisation.

    Floating-point buffers are filled with NaN before, which shows afterwards if the initialisation left one out.

    Raises:
        UnsupportedModelError: a buffer is part of the checkpoint, or the initialisation does not set it.
    """
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    filled_buffers = []
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                persistent = name not in module._non_persistent_buffers_set
                if persistent:
                    raise UnsupportedModelError(
                        f"{type(model).__name__}: keeps buffers in its checkpoint ({name}), which streaming does not "
                        "read; use model.streaming=off"
                    )
                filled = (
                    torch.full(buffer.shape, float("nan"))
                    if buffer.is_floating_point()
                    else torch.zeros_like(buffer, device="cpu")
                )
                module._buffers[name] = filled.to(buffer.dtype)
                filled_buffers.append((module, name))
    with torch.no_grad():
        model.initialize_weights()
    for module, name in filled_buffers:
        buffer = module._buffers[name]
        if buffer.is_floating_point() and not buffer.isfinite().all():
            raise UnsupportedModelError(
                f"{type(model).__name__}: {type(module).__name__}.{name} is not set by its initialisation, so it "
                "cannot be streamed; use model.streaming=off"
            )
        module._buffers[name] = buffer.to(device)
