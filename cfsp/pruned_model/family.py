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
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from torch import nn

from cfsp.architecture.attention import is_layer_config
from cfsp.errors import UnsupportedModelError
from cfsp.pruned_model import shapes_template
from cfsp.pruned_model.names import PACKAGE, PRUNED_PREFIX
from cfsp.pruned_model.sizes_template import CONFIGURATION, MODELING
from cfsp.pruned_model.stock import check_sizes_form, norms_of_family, stock_classes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

#: Held while a family is built, so that no second thread sees half of its modules.
_BUILDING = threading.RLock()
#: Held while texts are written. It is a lock of its own, which is never held during the import of their modules: an
#: import, which may wait for the text, holds a lock of Python's.
_WRITING = threading.RLock()


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
                _family_texts(family)
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


def _family_texts(base_model_type: str) -> _Texts:
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
        "import_config": _import_line(base_config),
        "import_models": _import_line(base_causal_lm, base_model),
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
        check_sizes_form(base_model_type, base_config, base_model, base_causal_lm)
        norms = norms_of_family(base_config, base_causal_lm)
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


def _import_line(*classes: type) -> str:
    """Return the line that imports ``classes``: from transformers, or from the modules that define them."""
    import transformers

    if all(getattr(transformers, cls.__name__, None) is cls for cls in classes):
        return f"from transformers import {', '.join(cls.__name__ for cls in classes)}"
    return "\n".join(f"from {cls.__module__} import {cls.__name__}" for cls in classes)


@cache
def _registered_family(base_model_type: str) -> PrunedFamily:
    """Build the classes of a family and register them with the Auto classes of transformers."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    texts = _family_texts(base_model_type)
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
