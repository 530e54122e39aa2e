"""Models whose FFN widths differ from layer to layer: their classes, and the code that ships in a folder.

transformers has no class for such a model, so each family gets a ``model_type`` of its own (``pruned_llama``)
on top of the family's stock classes. The classes used in this process come from the very text that is written
into a model folder, never from code found in one.
"""

from __future__ import annotations

import atexit
import copy
import importlib
import logging
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cfsp.errors import UnsupportedModelError
from cfsp.models.pruned_template import CONFIGURATION, MODELING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PRUNED_PREFIX = "pruned_"
COMMON_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

_PACKAGE = "cfsp_pruned_families"
_GATED_LINEARS = ("gate_proj", "up_proj", "down_proj")
# Big enough for a mixture-of-experts family to show that only its first layers are dense.
_PROBE_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    # transformers warns about default token ids that lie outside a default vocabulary.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class PrunedFamily:
    """The classes of one family with unequal FFN widths, and ``files``: file name -> the text to ship."""

    base_model_type: str
    model_type: str
    config_class: type[PretrainedConfig]
    model_class: type[PreTrainedModel]
    causal_lm_class: type[PreTrainedModel]
    files: dict[str, str]

    @property
    def auto_map(self) -> dict[str, str]:
        """The ``auto_map`` of config.json. AutoConfig comes first because vLLM imports in this order."""
        configuration, modeling = (name.removesuffix(".py") for name in self.files)
        return {
            "AutoConfig": f"{configuration}.{self.config_class.__name__}",
            "AutoModel": f"{modeling}.{self.model_class.__name__}",
            "AutoModelForCausalLM": f"{modeling}.{self.causal_lm_class.__name__}",
        }


def stock_type(model_type: str) -> str:
    """The transformers ``model_type`` behind a pruned one; a stock type is returned as it is."""
    return model_type.removeprefix(PRUNED_PREFIX)


@cache
def pruned_family(base_model_type: str) -> PrunedFamily:
    """Build (once) and register the classes that hold ``base_model_type`` with unequal FFN widths.

    Afterwards AutoConfig, AutoModel and AutoModelForCausalLM load such folders without ``trust_remote_code``.

    Raises:
        UnsupportedModelError: transformers has no causal language model of that type, or its layers have no
            ``mlp`` with Linear gate_proj, up_proj and down_proj of ``intermediate_size``.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    base_config, base_model, base_causal_lm = _stock_classes(base_model_type)
    _probe(base_model_type, base_config, base_model, base_causal_lm)

    pruned_type = PRUNED_PREFIX + base_model_type
    stem = pruned_type.replace("-", "_").replace(".", "_")
    configuration, modeling = f"configuration_{stem}", f"modeling_{stem}"
    names = {
        "base_type": base_model_type,
        "pruned_type": pruned_type,
        "configuration_module": configuration,
        "base_config": base_config.__name__,
        "base_model": base_model.__name__,
        "base_causal_lm": base_causal_lm.__name__,
        "pruned_config": f"Pruned{base_config.__name__}",
        "pruned_model": f"Pruned{base_model.__name__}",
        "pruned_causal_lm": f"Pruned{base_causal_lm.__name__}",
    }
    files = {
        f"{configuration}.py": CONFIGURATION.substitute(names),
        f"{modeling}.py": MODELING.substitute(names),
    }
    modules = _import_sources(files)
    family = PrunedFamily(
        base_model_type=base_model_type,
        model_type=pruned_type,
        config_class=getattr(modules[configuration], names["pruned_config"]),
        model_class=getattr(modules[modeling], names["pruned_model"]),
        causal_lm_class=getattr(modules[modeling], names["pruned_causal_lm"]),
        files=files,
    )
    AutoConfig.register(pruned_type, family.config_class)
    for auto_class, cls in ((AutoModel, family.model_class), (AutoModelForCausalLM, family.causal_lm_class)):
        auto_class.register(family.config_class, cls)
        # Makes a plain save_pretrained() copy the source files, so that its folder loads elsewhere too.
        cls.register_for_auto_class(auto_class.__name__)
    family.config_class.register_for_auto_class("AutoConfig")
    logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").addFilter(_unexpected)
    return family


def _unexpected(record: logging.LogRecord) -> bool:
    """The shipped code has the stock model read the global width first, which transformers warns about."""
    return "per-layer attribute `intermediate_size`" not in record.getMessage()


def register_pruned_families() -> None:
    """Register the common families, for code that loads pruned folders with plain transformers calls."""
    for base_model_type in COMMON_FAMILIES:
        pruned_family(base_model_type)


def adopt(model: PreTrainedModel, widths: Sequence[int]) -> None:
    """Make class and configuration of ``model`` tell the truth about FFN matrices that were sliced.

    Equal widths leave, or bring back, the stock class with ``config.intermediate_size`` set; unequal widths
    make it the family's ``Pruned...ForCausalLM``. The configuration is replaced by a copy, because another
    model may have been built from the same object. Parameters are not touched.

    Args:
        widths: one per layer; gate_proj and up_proj are already [width, hidden], down_proj [hidden, width].

    Raises:
        UnsupportedModelError: the model is no causal language model of a family that ``pruned_family`` knows.
        ValueError: a matrix does not have the width stated for its layer.
    """
    check_adoptable(model)
    base_type = stock_type(model.config.model_type)
    base_config, base_model, base_causal_lm = _stock_classes(base_type)
    widths = [int(width) for width in widths]
    _settle_mlps(model, widths)

    config = copy.deepcopy(model.config)
    config.per_layer_config = None
    # A configuration read from a file carries its model_type itself, hiding that of the class.
    config.__dict__.pop("model_type", None)
    if len(set(widths)) == 1:
        classes: tuple[type, type, type] = (base_config, base_model, base_causal_lm)
        for leftover in ("auto_map", "allow_global_per_layer_attribute_access"):
            config.__dict__.pop(leftover, None)
        config.__class__ = base_config
        config.intermediate_size = widths[0]
    else:
        family = pruned_family(base_type)
        classes = (family.config_class, family.model_class, family.causal_lm_class)
        config.__class__ = family.config_class
        config.auto_map = family.auto_map
        # Else transformers raises on every read of config.intermediate_size, even from getattr(..., None).
        config.allow_global_per_layer_attribute_access = True
        config.intermediate_size = max(config.intermediate_size, *widths)
        config.per_layer_config = {i: {"intermediate_size": width} for i, width in enumerate(widths)}
    config.architectures = [classes[2].__name__]

    decoder = model.model
    decoder.__class__, model.__class__ = classes[1], classes[2]
    _replace_config(model, model.config, config)


def check_adoptable(model: PreTrainedModel) -> None:
    """See, before anything is sliced, that :func:`adopt` will know the model (also on the meta device).

    Raises:
        UnsupportedModelError: as :func:`adopt` does.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: a causal language model of transformers is needed, e.g. from cfsp.load(FOLDER)"
        )
    base_causal_lm = _stock_classes(stock_type(model_type))[2]
    if not isinstance(model, base_causal_lm):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be pruned: a {base_causal_lm.__name__} is needed; unwrap it first (for "
            "LoRA: merge_and_unload); a model with code of its own can be evaluated (pruner=none), not pruned"
        )
    pruned_family(stock_type(model_type))


def _settle_mlps(model: PreTrainedModel, widths: list[int]) -> None:
    """Check the matrices against ``widths`` and bring the attributes that repeat a width up to date."""
    layers = model.model.layers
    if len(layers) != len(widths):
        raise ValueError(f"{len(widths)} widths for a model of {len(layers)} layers")
    for index, (layer, width) in enumerate(zip(layers, widths, strict=True)):
        gate, up, down = _gated_linears(layer, f"layer {index} of {type(model).__name__}")
        found = (gate.weight.shape[0], up.weight.shape[0], down.weight.shape[1])
        if found != (width, width, width):
            raise ValueError(f"layer {index}: width {width} stated, but gate, up, down have {found}")
        for linear in (gate, up, down):
            linear.out_features, linear.in_features = linear.weight.shape
        if hasattr(layer.mlp, "intermediate_size"):
            layer.mlp.intermediate_size = width


def _replace_config(model: nn.Module, old: PretrainedConfig, new: PretrainedConfig) -> None:
    """Modules of transformers keep references of their own to the configuration, under varying names."""
    for module in model.modules():
        for name, value in vars(module).items():
            if value is old:
                module.__dict__[name] = new


def _gated_linears(layer: nn.Module, where: str) -> list[nn.Linear]:
    mlp = getattr(layer, "mlp", None)
    linears = [getattr(mlp, name, None) for name in _GATED_LINEARS]
    if not all(isinstance(linear, nn.Linear) for linear in linears):
        names = [] if mlp is None else [name for name, _ in mlp.named_children()]
        found = f"{type(mlp).__name__} with {', '.join(names)}" if names else "no mlp"
        raise UnsupportedModelError(
            f"{where}: looked for an mlp with Linear {', '.join(_GATED_LINEARS)}, found {found}"
        )
    return linears  # type: ignore[return-value]


def _stock_classes(model_type: str) -> tuple[type, type, type]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    mappings: tuple[Any, Any] = (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(f"transformers knows no model type '{model_type}'")
    config_class = CONFIG_MAPPING[model_type]
    classes = [mapping.get(config_class, None) for mapping in mappings]
    if not all(isinstance(cls, type) for cls in classes):
        raise UnsupportedModelError(
            f"model type '{model_type}': looked for one model class and one causal language model class in "
            f"transformers, found {classes}"
        )
    return config_class, classes[0], classes[1]


def _probe(model_type: str, config_class: type, model_class: type, causal_lm_class: type) -> None:
    """See on a small model without memory whether the shipped code fits the structure of the family."""
    try:
        with torch.device("meta"):
            model: Any = causal_lm_class(config_class(**_PROBE_SIZES))
    except Exception as error:
        raise UnsupportedModelError(
            f"model type '{model_type}': no {causal_lm_class.__name__} of plain sizes can be built ({error})"
        ) from error
    decoder = getattr(model, "model", None)
    if type(decoder) is not model_class or not hasattr(decoder, "layers"):
        raise UnsupportedModelError(
            f"model type '{model_type}': looked for {causal_lm_class.__name__}.model of type "
            f"{model_class.__name__} with layers, found {[name for name, _ in model.named_children()]}"
        )
    for index, layer in enumerate(decoder.layers):
        gate, up, down = _gated_linears(layer, f"model type '{model_type}', layer {index}")
        found = (gate.out_features, up.out_features, down.in_features)
        if found != (_PROBE_SIZES["intermediate_size"],) * 3:
            raise UnsupportedModelError(
                f"model type '{model_type}', layer {index}: looked for FFN matrices of width "
                f"config.intermediate_size={_PROBE_SIZES['intermediate_size']}, found {found}"
            )


def _import_sources(files: dict[str, str]) -> dict[str, ModuleType]:
    """Import module texts from a folder of this process: save_pretrained copies the file of a class."""
    package = sys.modules.get(_PACKAGE)
    if package is None:
        folder = tempfile.mkdtemp(prefix="cfsp_pruned_families_")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        package = ModuleType(_PACKAGE, "The classes of pruned families; see cfsp.models.remote_code.")
        package.__path__ = [folder]
        sys.modules[_PACKAGE] = package
    for name, text in files.items():
        (Path(package.__path__[0]) / name).write_text(text, encoding="utf-8")
    importlib.invalidate_caches()
    stems: list[Any] = [name.removesuffix(".py") for name in files]
    return {stem: importlib.import_module(f"{_PACKAGE}.{stem}") for stem in stems}
