"""Classes of models whose layers have unequal sizes after a pruning, and the code that ships in their folders.

transformers has no class for such a model, so each family gets a ``model_type`` of its own (``pruned_llama``)
on top of the family's stock classes. The classes in this process come from the same text that is written into a model
folder, never from code in a folder.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import logging
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from cfsp.architecture.attention import FUSED_NAMES, is_layer_config
from cfsp.architecture.norms import served, watched
from cfsp.architecture.projection import is_matrix
from cfsp.errors import UnsupportedModelError
from cfsp.pruned_model import shapes_template
from cfsp.pruned_model.names import PACKAGE, PRUNED_PREFIX, SUBMODULES
from cfsp.pruned_model.sizes_template import CONFIGURATION, MODELING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

#: Held while a family is built, so that no second thread sees half of its modules.
_BUILDING = threading.RLock()
#: Held while texts are written. It is a lock of its own, which is never held during the import of their modules: an
#: import, which may wait for the text, holds a lock of Python's.
_WRITING = threading.RLock()
_GATED_LINEARS = ("gate_proj", "up_proj", "down_proj")
# Large enough for a mixture-of-experts family to show that only its first layers are dense.
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
    "vocab_size": 64,
}


@dataclass(frozen=True)
class PrunedFamily:
    """Classes of one family with unequal layers.

    Attributes:
        base_model_type: the stock ``model_type``.
        model_type: the ``model_type`` of the pruned family.
        config_class: configuration.
        model_class: decoder without LM head.
        causal_lm_class: causal language model.
        files: file name -> text to ship in a model folder.
        form: how a configuration describes unequal layers. sizes: per_layer_config, which other tools read, for
            layers with a self_attn and a gated mlp. shapes: layer_changes, for all others.
        norms: with the form sizes, attention and mlp -> attributes of the norms that serve that submodule alone.
        modeling: the module of the modelling file.
    """

    base_model_type: str
    model_type: str
    config_class: type[PretrainedConfig]
    model_class: type[PreTrainedModel]
    causal_lm_class: type[PreTrainedModel]
    files: dict[str, str]
    form: Literal["sizes", "shapes"]
    norms: dict[str, tuple[str, ...]]
    modeling: ModuleType

    @property
    def auto_map(self) -> dict[str, str]:
        """Entry ``auto_map`` of config.json. AutoConfig comes first because vLLM imports in this order."""
        configuration, modeling = (name.removesuffix(".py") for name in self.files)
        return {
            "AutoConfig": f"{configuration}.{self.config_class.__name__}",
            "AutoModel": f"{modeling}.{self.model_class.__name__}",
            "AutoModelForCausalLM": f"{modeling}.{self.causal_lm_class.__name__}",
        }


def pruned_family(base_model_type: str) -> PrunedFamily:
    """Build (once) and register the classes that hold ``base_model_type`` with unequal layers. Any thread may ask.

    Afterwards AutoConfig, AutoModel and AutoModelForCausalLM load such folders without ``trust_remote_code``.

    Raises:
        UnsupportedModelError: transformers has no causal language model of that type.
    """
    with _BUILDING:
        return _registered_family(base_model_type)


def write_module(module: str) -> None:
    """Write the text of a family's module ("cfsp_pruned_families.modeling_pruned_llama"), so that it can be imported.

    A pickled model names its class by this module, which the process that reads it may not have built.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    named = module.rpartition(".")[2].partition(f"_{PRUNED_PREFIX}")[2]
    for family in (named, named.replace("_", "-")):
        if family in CONFIG_MAPPING:
            with contextlib.suppress(UnsupportedModelError):  # then there is no such module
                _texts(family)
            return


@dataclass(frozen=True)
class _Texts:
    """Source of a family.

    Attributes:
        files: file name -> text, as it ships.
        names: the names that were filled into the templates.
        form: how a configuration describes unequal layers (:class:`PrunedFamily`).
        norms: norms that serve one submodule alone (:class:`PrunedFamily`).
    """

    files: dict[str, str]
    names: dict[str, str]
    form: Literal["sizes", "shapes"]
    norms: dict[str, tuple[str, ...]]


def _texts(base_model_type: str) -> _Texts:
    with _WRITING:
        return _write_texts(base_model_type)


def family_names(base_model_type: str) -> dict[str, str]:
    """Return the names that are filled into the templates of a family, except its norms.

    Raises:
        UnsupportedModelError: transformers has no causal language model of that type.
    """
    base_config, base_model, base_causal_lm = stock_classes(base_model_type)
    pruned_type = PRUNED_PREFIX + base_model_type
    stem = pruned_type.replace("-", "_").replace(".", "_")
    return {
        "base_type": base_model_type,
        "pruned_type": pruned_type,
        "configuration_module": f"configuration_{stem}",
        "modeling_module": f"modeling_{stem}",
        "import_config": _import_of(base_config),
        "import_models": _import_of(base_causal_lm, base_model),
        "base_config": base_config.__name__,
        "base_model": base_model.__name__,
        "base_causal_lm": base_causal_lm.__name__,
        "pruned_config": f"Pruned{base_config.__name__}",
        "pruned_model": f"Pruned{base_model.__name__}",
        "pruned_causal_lm": f"Pruned{base_causal_lm.__name__}",
    }


@cache
def _write_texts(base_model_type: str) -> _Texts:
    """Write the files of a family to the folder that they are imported from."""
    base_config, base_model, base_causal_lm = stock_classes(base_model_type)
    form: Literal["sizes", "shapes"] = "sizes"
    norms: dict[str, tuple[str, ...]] = {}
    try:
        _probe(base_model_type, base_config, base_model, base_causal_lm)
        norms = _norms(base_config, base_causal_lm)
    except UnsupportedModelError:
        form = "shapes"
    template = MODELING if form == "sizes" else shapes_template.MODELING
    names = family_names(base_model_type)
    names["norms"] = json.dumps({kind: list(attributes) for kind, attributes in norms.items()})
    configuration, modeling = names["configuration_module"], names["modeling_module"]
    files = {
        f"{configuration}.py": CONFIGURATION.substitute(names),
        f"{modeling}.py": template.substitute(names),
    }
    folder = Path(package().__path__[0])
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    importlib.invalidate_caches()
    return _Texts(files, names, form, norms)


def _import_of(*classes: type) -> str:
    """Return the line that imports ``classes``: from transformers, or from the modules that define them."""
    import transformers

    if all(getattr(transformers, cls.__name__, None) is cls for cls in classes):
        return f"from transformers import {', '.join(cls.__name__ for cls in classes)}"
    return "\n".join(f"from {cls.__module__} import {cls.__name__}" for cls in classes)


@cache
def _registered_family(base_model_type: str) -> PrunedFamily:
    """Build the classes of a family and register them with the Auto classes of transformers."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    texts = _texts(base_model_type)
    files, names = texts.files, texts.names
    configuration, modeling = (importlib.import_module(f"{PACKAGE}.{name.removesuffix('.py')}") for name in files)
    family = PrunedFamily(
        base_model_type=base_model_type,
        model_type=names["pruned_type"],
        config_class=getattr(configuration, names["pruned_config"]),
        model_class=getattr(modeling, names["pruned_model"]),
        causal_lm_class=getattr(modeling, names["pruned_causal_lm"]),
        files=files,
        form=texts.form,
        norms=texts.norms,
        modeling=modeling,
    )
    AutoConfig.register(family.model_type, family.config_class)
    for auto_class, cls in ((AutoModel, family.model_class), (AutoModelForCausalLM, family.causal_lm_class)):
        auto_class.register(family.config_class, cls)
        # Makes a plain save_pretrained() copy the source files, so that its folder loads elsewhere too.
        cls.register_for_auto_class(auto_class.__name__)
    family.config_class.register_for_auto_class("AutoConfig")
    logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").addFilter(_is_relevant)
    return family


def _is_relevant(record: logging.LogRecord) -> bool:
    """Drop a warning of transformers: the shipped code lets the stock model read the global sizes first."""
    return "per-layer attribute" not in record.getMessage()


def replace_config(model: nn.Module, old: PretrainedConfig, new: PretrainedConfig) -> None:
    """Replace the configuration in every module; modules of transformers keep references to it under varying names."""
    for module in model.modules():
        for name, value in vars(module).items():
            if value is old:
                module.__dict__[name] = new
            elif is_layer_config(value) and vars(value)["config"] is old:
                vars(value)["config"] = new


def gated_linears(layer: nn.Module, where: str) -> list[nn.Linear]:
    """Return gate_proj, up_proj and down_proj of a layer's mlp.

    Args:
        layer: the layer.
        where: name of the layer in messages.

    Raises:
        UnsupportedModelError: the layer has no such mlp.
    """
    mlp = getattr(layer, "mlp", None)
    linears = [getattr(mlp, name, None) for name in _GATED_LINEARS]
    if not all(isinstance(linear, nn.Linear) for linear in linears):
        names = [] if mlp is None else [name for name, _ in mlp.named_children()]
        actual = f"{type(mlp).__name__} with {', '.join(names)}" if names else "no mlp"
        raise UnsupportedModelError(
            f"{where}: looked for an mlp with Linear {', '.join(_GATED_LINEARS)}, found {actual}"
        )
    return linears  # type: ignore[return-value]


def stock_classes(model_type: str) -> tuple[type, type, type]:
    """Return the classes of a stock ``model_type``: configuration, decoder and causal language model.

    Raises:
        UnsupportedModelError: transformers has no such model type, or not exactly one class of each kind for it.
    """
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
    """Check on a small model without memory that the form sizes fits the structure of the family.

    Raises:
        UnsupportedModelError: the structure is another one.
    """
    try:
        with torch.device("meta"), _silent():
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
        gate, up, down = gated_linears(layer, f"model type '{model_type}', layer {index}")
        widths = (gate.out_features, up.out_features, down.in_features)
        if widths != (_PROBE_SIZES["intermediate_size"],) * 3:
            raise UnsupportedModelError(
                f"model type '{model_type}', layer {index}: looked for FFN matrices of width "
                f"config.intermediate_size={_PROBE_SIZES['intermediate_size']}, found {widths}"
            )
        # Sizes are read off these names and written to them; other heads would be described wrongly.
        if "self_attn.o_proj.weight" not in dict(layer.named_parameters()) or any(
            is_matrix(getattr(layer.self_attn, name, None)) for name in FUSED_NAMES
        ):
            raise UnsupportedModelError(
                f"model type '{model_type}', layer {index}: looked for an attention with an o_proj and no fused "
                f"projection, found {[name for name, _ in layer.named_children()]}"
            )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silence the log of transformers, in which a family may complain about sizes that are not its own."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _norms(config_class: type, causal_lm_class: type) -> dict[str, tuple[str, ...]]:
    """Return the norms that serve only the attention, or only the FFN, of a layer, from one pass of a small model."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model: Any = causal_lm_class(config_class(**_PROBE_SIZES)).eval()
    try:
        with watched(model.model.layers[0]) as seen, torch.no_grad():
            model(torch.arange(4)[None], use_cache=False)
    except Exception:  # the family does not run like this; its norms then stay, which costs parameters and nothing else
        return dict.fromkeys(SUBMODULES, ())
    return served(seen, {kind: (name,) for kind, name in SUBMODULES.items()})


def package() -> ModuleType:
    """Return the package of the families' modules.

    It lies in a folder of this process, because save_pretrained copies the file of a class.
    """
    with _WRITING:
        families = sys.modules.get(PACKAGE)
        if families is None or not hasattr(families, "__path__"):
            folder = tempfile.mkdtemp(prefix=f"{PACKAGE}_")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            families = ModuleType(PACKAGE, "The classes of pruned families; see cfsp.pruned_model.family.")
            families.__path__ = [folder]
            sys.modules[PACKAGE] = families
        return families
