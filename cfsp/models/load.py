"""Loading a model and its tokenizer: structure first (meta device), then the weights, refused if incomplete."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cfsp.config import DType, ModelSection
from cfsp.errors import CheckpointError, ConfigError, UnsupportedModelError
from cfsp.models.checkpoint import first_non_finite
from cfsp.models.remote_code import PRUNED_PREFIX, pruned_family
from cfsp.models.source import ModelSource, locate
from cfsp.models.views import DecoderView, resolve


def resolve_device(name: str) -> torch.device:
    """``auto`` is cuda where there is one, else cpu.

    Raises:
        ConfigError: an unknown device, or one that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"model.device={name}: not usable here ({reason}); use model.device=auto or cpu") from error
    return device


def resolve_dtype(name: DType, device: torch.device, config: dict[str, Any]) -> torch.dtype:
    """``auto``: float32 on CPU (fast and exact there), the checkpoint's dtype on an accelerator."""
    if name != "auto":
        return getattr(torch, name)
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    return torch.float32 if device.type == "cpu" else getattr(torch, str(stored).removeprefix("torch."))


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
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        raise UnsupportedModelError(
            f"model.path={source.origin}: transformers does not know this model (model_type={model_type!r}): "
            f"{str(error).splitlines()[0]}"
        ) from error


def outline(source: ModelSource, *, trust_remote_code: bool = False) -> DecoderView:
    """The model's structure on the meta device: shapes without a byte of weights."""
    from transformers import AutoModelForCausalLM

    config = load_config(source, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"model.path={source.origin}: not a causal language model that transformers loads "
            f"({str(error).splitlines()[0]})"
        ) from error
    return resolve(model)


def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise CheckpointError(
            f"model.path={source.origin}: the folder has no tokenizer that transformers loads "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); copy the tokenizer files there"
        ) from error


def load_model(
    source: ModelSource, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> nn.Module:
    """Load the weights, in eval mode.

    Raises:
        CheckpointError: weights are missing, of the wrong shape, unreadable, or not finite.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(source, trust_remote_code=trust_remote_code)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source.folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"model.path={source.origin}: the weights cannot be loaded ({str(error).splitlines()[0]})"
        ) from error
    wrong = [*report.get("missing_keys", ()), *report.get("mismatched_keys", ())]
    if wrong:
        raise CheckpointError(
            f"model.path={source.origin}: {len(wrong)} weights are missing or of another shape, first {wrong[0]}; "
            "the folder's config.json and safetensors do not belong together"
        )
    name = first_non_finite(model)
    if name is not None:
        raise CheckpointError(
            f"model.path={source.origin}: {name} holds NaN or infinite values; the checkpoint is damaged"
        )
    model = model.to(device).eval()
    model._cfsp_fingerprint = source.fingerprint
    return model


def load(path: str | Path, *, dtype: DType = "auto", device: str = "auto") -> tuple[Any, Any]:
    """Load any model folder or hub id, pruned ones of any form included: ``model, tokenizer = cfsp.load(path)``.

    Raises:
        CheckpointError: the folder is missing, incomplete or damaged.
    """
    source = locate(ModelSection(name=Path(path).name, path=str(path)))
    where = resolve_device(device)
    model = load_model(source, dtype=resolve_dtype(dtype, where, source.config), device=where)
    return model, load_tokenizer(source)
