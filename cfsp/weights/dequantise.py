"""Model folders from quantised checkpoints: the outline first, the dequantised weights when they are needed.

transformers dequantises some methods while it loads (FP8, MXFP4, compressed-tensors) and some afterwards
(bitsandbytes); what it cannot do on this machine is refused before a weight is read. The rest of cfsp then works with a
model folder like any other. Weights are float32, so that no value that the quantiser stands for is rounded again.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cfsp.errors import CheckpointError
from cfsp.system.memory import available
from cfsp.weights.atomic_folder import atomic_folder
from cfsp.weights.folder_check import readable_by_transformers, without_mark
from cfsp.weights.shards import INDEX, read_header, weight_files
from cfsp.weights.transformers_noise import line_of, quiet

#: Raised when the folders are written in another way, so that older ones are not used.
_FORMAT = 1
_MAX_SHARD = "4GB"
_KEY = "quantization_config"
#: Scales of activations and of the KV cache, which say nothing about the weights.
_OF_ACTIVATIONS = re.compile(r"\.((input|output|activation)_(scale|zero_point|global_scale)|[qkv]_(scale|zero_point))$")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
#: Parameters that one stored element stands for at most.
_PER_ELEMENT = {"U8": 2, "I8": 2, "I16": 8, "I32": 16, "I64": 32}


@dataclass(frozen=True)
class QuantisedOrigin:
    """The quantised checkpoint that a model is read from.

    Attributes:
        method: name of the quantisation as in config.json, with its bits where they are stated.
        path: folder of the checkpoint.
        folders: the folder that holds the model folders made of it.
        trust_remote_code: whether the model's own code may run.
        notes: remarks for the user, as sentences.
    """

    method: str
    path: Path = field(compare=False)
    folders: Path = field(compare=False)
    trust_remote_code: bool = field(default=False, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def facts(self) -> dict[str, str]:
        """Facts for the record."""
        return {"method": self.method, "weights": "dequantised"}

    @property
    def sentence(self) -> str:
        """A sentence that states the method and that the weights are dequantised."""
        return f"quantised checkpoint ({self.method}): the weights are those of the checkpoint, dequantised"


def settings_of(config: Mapping[str, Any]) -> Any:
    """Return the settings of the quantiser in a config.json, or in the text model nested in it; None without any."""
    nested = config.get("text_config")
    sections = [config, nested] if isinstance(nested, dict) else [config]
    return next((section[_KEY] for section in sections if section.get(_KEY)), None)


def method_of(settings: Any) -> str:
    """Return the name of a quantisation for the user: fp8, bitsandbytes 4 bit, compressed-tensors pack-quantized."""
    if not isinstance(settings, Mapping):
        return str(settings)[:60]
    name, bits = _name_of(settings), settings.get("bits")
    if name.startswith("bitsandbytes_"):
        bits = int(name.removeprefix("bitsandbytes_").removesuffix("bit"))
        name = "bitsandbytes"
    stated = f"{bits} bit" if isinstance(bits, int) else settings.get("format")
    return f"{name} {stated}" if isinstance(stated, str) else name


def _name_of(settings: Mapping[str, Any]) -> str:
    """Return the name under which transformers knows a quantisation."""
    for key, suffix in (("load_in_4bit", "_4bit"), ("load_in_8bit", "_8bit")):
        if settings.get(key):
            return f"bitsandbytes{suffix}"
    return str(settings.get("quant_method", "unknown"))


def _dequantised_by() -> dict[str, str]:
    """Return the methods that transformers dequantises: name -> the setting to load with, or "" for afterwards."""
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer

    methods = {}
    for name, settings in auto.AUTO_QUANTIZATION_CONFIG_MAPPING.items():
        quantiser = auto.AUTO_QUANTIZER_MAPPING.get(name)
        keys = inspect.signature(settings).parameters
        setting = next((key for key in ("dequantize", "run_compressed") if key in keys), None)
        if name != "gguf" and setting is not None:
            methods[name] = setting
        elif quantiser is not None and getattr(quantiser, "_dequantize", None) is not HfQuantizer._dequantize:
            methods[name] = ""
    return methods


def unable(settings: Any) -> str | None:
    """Return why transformers cannot dequantise weights of these settings on this machine; None where it can."""
    from transformers.quantizers.auto import AutoHfQuantizer

    supported = _dequantised_by()
    if not isinstance(settings, Mapping) or _name_of(settings) not in supported:
        return f"transformers does not dequantise this method; it does {', '.join(sorted(supported))}"
    try:
        with quiet():
            quantiser = AutoHfQuantizer.from_config(_to_dequantise(settings), pre_quantized=True)
            quantiser.validate_environment(device_map=None, weights_only=True)
    except Exception as error:  # packages that are missing, settings that are wrong, a GPU that is needed
        return f"transformers cannot dequantise it here: {line_of(error).rstrip('.')}"
    return None


def _to_dequantise(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with which transformers dequantises while it loads."""
    setting = _dequantised_by()[_name_of(settings)]
    changed = {key: value for key, value in settings.items() if key not in ("dequantize", "run_compressed")}
    return changed | ({setting: setting == "dequantize"} if setting else {})


def check(config: Mapping[str, Any], folder: Path, where: str, *, dequantise: bool) -> QuantisedOrigin | None:
    """Refuse a quantised checkpoint that is not to be dequantised, or cannot be.

    Args:
        config: content of its config.json.
        folder: its folder.
        where: name of the folder in messages.
        dequantise: whether the user asked for dequantised weights.

    Returns:
        The checkpoint, without a place for folders; None where it is not quantised.

    Raises:
        CheckpointError: names the method and the way out.
    """
    settings = settings_of(config)
    if settings is None:
        return None
    method = method_of(settings)
    reason = unable(settings)
    if reason is not None:
        raise CheckpointError(
            f"{where}: its weights are quantised ({method}), and {reason}; give the model before quantisation"
        )
    if not dequantise:
        raise CheckpointError(
            f"{where}: its weights are quantised ({method}); give the model before quantisation, or set "
            "model.dequantize=true to prune the dequantised weights"
        )
    _check_scales(folder, where)
    return QuantisedOrigin(method, folder, folder)


def _check_scales(folder: Path, where: str) -> None:
    """Refuse 8-bit floats without a scale, which transformers would take for the weights themselves."""
    entries = _entries(folder)
    scaled = {name.rpartition(".")[0] for name in entries if "scale" in name.rpartition(".")[2]}
    for name, entry in entries.items():
        weight = name.endswith("weight") and str(entry["dtype"]).startswith("F8")
        if weight and name.rpartition(".")[0] not in scaled:
            raise CheckpointError(f"{where}: {name} is stored in 8 bits without its scale; fetch the model again")


def _entries(folder: Path) -> dict[str, Any]:
    return {name: entry for file in weight_files(folder) for name, entry in read_header(file)[0].items()}


def folders_of(fingerprint: str) -> str:
    """Return the name of the folder for a checkpoint; another version of transformers gets another folder."""
    from transformers import __version__

    return f"{hashlib.sha256(fingerprint.encode()).hexdigest()[:16]}-{_FORMAT}-{__version__}"


def write_outline(origin: QuantisedOrigin, outline: Path, where: str) -> None:
    """Write the files beside the weights as a model folder, without a trace of the quantiser.

    Args:
        origin: the checkpoint.
        outline: the folder; an older one is replaced.
        where: name of the checkpoint in messages.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    with atomic_folder(outline) as scratch:
        for file in sorted(readable_by_transformers(origin.path).iterdir()):
            if file.is_file() and file.suffix in (".json", ".model", ".txt", ".jinja", ".md", ".py", ""):
                (scratch / file.name).write_bytes(file.read_bytes())
        for name in (INDEX, "quantize_config.json", "quant_config.json", "recipe.yaml"):
            (scratch / name).unlink(missing_ok=True)
        write_config_of(scratch, scratch)


def write_config_of(folder: Path, to: Path) -> None:
    """Write config.json and code of a quantised checkpoint as those of its dequantised weights.

    Args:
        folder: the checkpoint.
        to: an existing folder, which may be the same.
    """
    for file in folder.glob("*.py") if to != folder else ():
        (to / file.name).write_bytes(file.read_bytes())
    config = _without_quantiser(json.loads(without_mark((folder / "config.json").read_bytes())))
    (to / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _without_quantiser(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration of float32 weights; a nested one that states a dtype or a quantiser likewise."""
    plain = {key: value for key, value in config.items() if key not in (_KEY, "compression_config", "torch_dtype")}
    for key, value in plain.items():
        if isinstance(value, dict) and {_KEY, "torch_dtype", "dtype"} & value.keys():
            plain[key] = _without_quantiser(value)
    return plain | {"dtype": "float32"}


def write_weights(origin: QuantisedOrigin, outline: Path, folder: Path, where: str) -> None:
    """Write the folder ``outline`` with the dequantised weights of the checkpoint.

    Args:
        origin: the checkpoint.
        outline: folder of :func:`write_outline`.
        folder: the folder; an older one is replaced.
        where: name of the checkpoint in messages.

    Raises:
        CheckpointError: the weights cannot be read, are incomplete, do not fit into memory, or cannot be written.
    """
    needed, free = _bytes_needed(origin.path), available(torch.device("cpu"))
    if needed > 0.9 * free:
        raise CheckpointError(
            f"{where}: dequantised weights take up to {needed / 1e9:.1f} GB of memory once, {free / 1e9:.1f} GB are "
            "free; make room, or give the model before quantisation"
        )
    model = _loaded(origin, where)
    with atomic_folder(folder) as scratch:
        with quiet():
            model.save_pretrained(scratch, max_shard_size=_MAX_SHARD)
        for file in outline.iterdir():  # config.json too: save_pretrained writes one with its own ideas
            (scratch / file.name).write_bytes(file.read_bytes())


def _bytes_needed(folder: Path) -> int:
    """Return an upper bound of the bytes that the weights take as float32."""
    elements = 0
    for entry in _entries(folder).values():
        n = _PER_ELEMENT.get(entry["dtype"], 1)
        for size in entry["shape"]:
            n *= size
        elements += n
    return 4 * elements


def _loaded(origin: QuantisedOrigin, where: str) -> Any:
    """Return the model with dequantised weights, from which every trace of the quantiser is removed.

    Raises:
        CheckpointError: weights are missing, have no place, or stay quantised.
    """
    import transformers

    folder, trust = readable_by_transformers(origin.path), origin.trust_remote_code
    try:
        with quiet():
            config: Any = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust)
            holder = config if getattr(config, _KEY, None) else config.get_text_config()
            at_load = _dequantised_by()[_name_of(getattr(holder, _KEY))]
            setattr(holder, _KEY, _to_dequantise(getattr(holder, _KEY)))
            loaded: Any = _class_of(config).from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust,
                output_loading_info=True,
            )  # fmt: skip
            model, report = loaded
            if not at_load:
                model = model.dequantize(torch.float32)
            model = model.to("cpu")
    except Exception as error:  # quantisers and their packages check little themselves
        raise CheckpointError(
            f"{where}: transformers cannot dequantise the weights ({origin.method}: {line_of(error)}); give the model "
            "before quantisation"
        ) from error
    lost = [name for name in report.get("unexpected_keys", ()) if not _OF_ACTIVATIONS.search(name)]
    wrong = [*report.get("missing_keys", ()), *report.get("mismatched_keys", ()), *sorted(lost)]
    wrong += [name for name, weight in model.named_parameters() if weight.dtype not in _FLOATS]
    if wrong:
        raise CheckpointError(
            f"{where}: {len(wrong)} weights are missing, without a place, or not dequantised by transformers, first "
            f"{wrong[0]}; give the model before quantisation"
        )
    model = model.float()  # transformers keeps what the quantiser left as it was in the dtype of the file
    # With the conversions of the quantiser, save_pretrained would quantise the weights again.
    model._weight_conversions = None
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(name, None)
    for section in (model.config, model.config.get_text_config()):
        vars(section).pop(_KEY, None)
    return model


def _class_of(config: Any) -> Any:
    """Return the class that wrote the checkpoint, so that the tensors keep their names."""
    import transformers

    names = getattr(config, "architectures", None) or [""]
    quantizer = getattr(transformers, str(names[0]), None)
    return quantizer if hasattr(quantizer, "from_pretrained") else transformers.AutoModelForCausalLM


def note_of(config: Mapping[str, Any]) -> str | None:
    """Return what a run says to a quantised checkpoint, as a note of ``cfsp inspect``; None where it is not one."""
    settings = settings_of(config)
    if settings is None:
        return None
    method, reason = method_of(settings), unable(settings)
    if reason is not None:
        return f"quantised ({method}): {reason}; a run needs the model before quantisation"
    return f"quantised ({method}): a run needs model.dequantize=true and dequantises the weights to float32"
