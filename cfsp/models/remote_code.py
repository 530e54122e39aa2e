"""Models whose layers differ in what a pruning left of them: their classes, and the code that ships in a folder.

transformers has no class for such a model, so each family gets a ``model_type`` of its own (``pruned_llama``)
on top of the family's stock classes. The classes used in this process come from the very text that is written
into a model folder, never from code found in one.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
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

from cfsp.errors import UnsupportedModelError
from cfsp.models import shapes_template
from cfsp.models.attention import FUSED_NAMES, is_layer_config
from cfsp.models.projection import is_matrix
from cfsp.models.pruned_template import CONFIGURATION, MODELING
from cfsp.models.serving_norms import served, watched
from cfsp.registration import PACKAGE, PRUNED_PREFIX

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

COMMON_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

#: Families are made one at a time: of two threads at it one would find half of its modules.
_MAKING = threading.RLock()
#: The texts alone. A lock of its own, which is never held while their modules are imported: the import of one, which
#: may wait for its text, holds a lock of Python's.
_WRITING = threading.RLock()
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
    "vocab_size": 64,
}

#: Names of the submodules in a layer of every family that is supported.
SUBMODULES = {"attention": "self_attn", "mlp": "mlp"}
#: The output projections that a bias compensation can give a bias.
_BIASED = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class PrunedFamily:
    """The classes of one family with unequal layers, and ``files``: file name -> the text to ship.

    ``form``: how a folder says what differs: "sizes" (per_layer_config, which other tools read), for layers with a
    self_attn and a gated mlp; "shapes" (layer_changes) for all others. ``norms``: of the first, "attention" and "mlp"
    -> the attributes of the norms that serve that submodule alone. ``modeling``: the module of the modelling file.
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


def pruned_family(base_model_type: str) -> PrunedFamily:
    """Build (once) and register the classes that hold ``base_model_type`` with unequal layers. Any thread may ask.

    Afterwards AutoConfig, AutoModel and AutoModelForCausalLM load such folders without ``trust_remote_code``.

    Raises:
        UnsupportedModelError: transformers has no causal language model of that type.
    """
    with _MAKING:
        return _made(base_model_type)


def write_module(module: str) -> None:
    """Have the text of a family's module ("cfsp_pruned_families.modeling_pruned_llama") there to be imported.

    The class of a pickled model is named by it, and another process has not made it.
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
    """The source of a family: ``files`` as they ship, the names that were filled in, and what was seen of the norms."""

    files: dict[str, str]
    names: dict[str, str]
    form: Literal["sizes", "shapes"]
    norms: dict[str, tuple[str, ...]]


def _texts(base_model_type: str) -> _Texts:
    with _WRITING:
        return _written(base_model_type)


def family_names(base_model_type: str) -> dict[str, str]:
    """Names that are filled into the templates of a family, but for its norms.

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
def _written(base_model_type: str) -> _Texts:
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
    """The line that imports ``classes``: from transformers, or from where else somebody registered them from."""
    import transformers

    if all(getattr(transformers, cls.__name__, None) is cls for cls in classes):
        return f"from transformers import {', '.join(cls.__name__ for cls in classes)}"
    return "\n".join(f"from {cls.__module__} import {cls.__name__}" for cls in classes)


@cache
def _made(base_model_type: str) -> PrunedFamily:
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
    logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").addFilter(_unexpected)
    return family


def _unexpected(record: logging.LogRecord) -> bool:
    """The shipped code has the stock model read the global sizes first, which transformers warns about."""
    return "per-layer attribute" not in record.getMessage()


def adopt(model: PreTrainedModel) -> None:
    """Make class and configuration of ``model`` tell the truth about its layers as they are now.

    Where the stock class with a plain configuration describes them it is left, or brought back; elsewhere the model
    becomes the family's ``Pruned...ForCausalLM`` with a ``per_layer_config``. The configuration is replaced by a copy,
    because another model may have been built from the same object. Parameters are not touched.

    Raises:
        UnsupportedModelError: the model is no causal language model of a family that ``pruned_family`` knows, its
            layers have another structure, or no attention is left.
    """
    check_adoptable(model)
    base_type = stock_type(model.config.model_type)
    base_config, base_model, base_causal_lm = stock_classes(base_type)
    family = pruned_family(base_type)
    if family.form == "shapes":
        from cfsp.models.layer_changes import adopt_by_shapes

        adopt_by_shapes(model, family)
        return
    shapes = [_shape(model, index) for index in range(len(model.model.layers))]
    config = copy.deepcopy(model.config)
    config.per_layer_config = None
    # A configuration read from a file carries its model_type itself, hiding that of the class.
    config.__dict__.pop("model_type", None)
    for leftover in ("auto_map", "allow_global_per_layer_attribute_access", "added_bias", "shared_norms"):
        config.__dict__.pop(leftover, None)
    config.__class__ = base_config
    _settle_first_type(config, shapes)
    _settle_layers(model, shapes, family)
    biases = _added_biases(model, config, base_causal_lm, shapes)
    if _is_plain(shapes, biases, config):
        classes: tuple[type, type, type] = (base_config, base_model, base_causal_lm)
        config.intermediate_size = shapes[0].intermediate_size
        _set_heads(config, shapes[0])
    else:
        classes = (family.config_class, family.model_class, family.causal_lm_class)
        config.__class__ = family.config_class
        config.auto_map = family.auto_map
        # Else transformers raises on every read of config.intermediate_size, even from getattr(..., None).
        config.allow_global_per_layer_attribute_access = True
        config.intermediate_size = max([config.intermediate_size, *(shape.intermediate_size or 0 for shape in shapes)])
        if biases:
            config.added_bias = biases
        if shared := _shared_norms(model, family):
            config.shared_norms = shared
        config.per_layer_config = _per_layer(shapes, config)
    config.architectures = [classes[2].__name__]
    model.model.__class__, model.__class__ = classes[1], classes[2]
    replace_config(model, model.config, config)
    family.modeling.number_cache_slots(model.model)


def _settle_first_type(config: PretrainedConfig, shapes: list[_LayerShape]) -> None:
    """Where layer 0 lost its attention, its type (sliding or full) becomes that of the first one that is left.

    The cache has a slot of each layer's type and counts tokens in slot 0, so an attention of that type must use it.
    """
    there = [index for index, shape in enumerate(shapes) if shape.heads is not None]
    if not there:
        raise UnsupportedModelError("no attention is left in any layer; such a model cannot run")
    types = getattr(config, "layer_types", None)
    if types and there[0] != 0:
        config.layer_types = [types[there[0]], *types[1:]]


@dataclass(frozen=True)
class _LayerShape:
    """What is in a layer: None where the submodule was removed."""

    intermediate_size: int | None
    heads: int | None
    kv_heads: int | None


def _shape(model: PreTrainedModel, index: int) -> _LayerShape:
    layer = model.model.layers[index]
    width = heads = kv_heads = None
    if not _is_stub(layer.mlp):
        gate, up, down = _gated_linears(layer, f"layer {index} of {type(model).__name__}")
        found = (gate.weight.shape[0], up.weight.shape[0], down.weight.shape[1])
        if len(set(found)) != 1:
            raise UnsupportedModelError(f"layer {index}: its gate, up and down have the widths {found}")
        width = found[0]
    attention = layer.self_attn
    if not _is_stub(attention):
        head_dim = getattr(attention, "head_dim", 0)
        q, k = getattr(attention, "q_proj", None), getattr(attention, "k_proj", None)
        if head_dim and isinstance(q, nn.Linear) and isinstance(k, nn.Linear):
            heads, kv_heads = q.weight.shape[0] // head_dim, k.weight.shape[0] // head_dim
        else:  # an attention that nobody can have narrowed
            heads = model.config.num_attention_heads
            kv_heads = getattr(model.config, "num_key_value_heads", heads)
    return _LayerShape(width, heads, kv_heads)


def _is_stub(module: nn.Module) -> bool:
    return getattr(module, "removed", None) in SUBMODULES


def _is_plain(shapes: list[_LayerShape], biases: dict[str, list[str]], config: PretrainedConfig) -> bool:
    """Whether the stock class with a plain configuration describes these layers."""
    first = shapes[0]
    if biases or any(shape != first for shape in shapes) or first.intermediate_size is None or first.heads is None:
        return False
    # What transformers checks of a LLaMA-like configuration; other head counts need the pruned classes.
    return first.heads == config.num_attention_heads or config.hidden_size % first.heads == 0


def _shared_norms(model: PreTrainedModel, family: PrunedFamily) -> list[str]:
    """Norms that outlived a submodule which they serve alone elsewhere in the family (a parallel residual)."""
    return sorted(
        {
            name
            for layer in model.model.layers
            for kind, attribute in SUBMODULES.items()
            if _is_stub(getattr(layer, attribute))
            for name in family.norms[kind]
            # None: StableLM's block with a parallel residual has one norm for both.
            if (norm := getattr(layer, name)) is not None and list(norm.parameters())
        }
    )


def _set_heads(config: PretrainedConfig, shape: _LayerShape) -> None:
    if shape.heads != config.num_attention_heads:
        config.head_dim = _head_dim(config)
        config.num_attention_heads, config.num_key_value_heads = shape.heads, shape.kv_heads


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _per_layer(shapes: list[_LayerShape], config: PretrainedConfig) -> dict[int | str, dict[str, Any]]:
    entries: dict[int | str, dict[str, Any]] = {}
    if any(shape.heads not in (None, config.num_attention_heads) for shape in shapes):
        # Else tools derive it from a layer's number of heads.
        config.head_dim = _head_dim(config)
    unequal = len({shape.intermediate_size for shape in shapes}) > 1
    if not unequal and shapes[0].intermediate_size is not None:
        config.intermediate_size = shapes[0].intermediate_size
    for index, shape in enumerate(shapes):
        entry: dict[str, Any] = {}
        if shape.intermediate_size is not None and unequal:
            entry["intermediate_size"] = shape.intermediate_size
        if shape.heads is not None and shape.heads != config.num_attention_heads:
            entry |= {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads}
        missing = [
            kind for kind, there in (("attention", shape.heads), ("mlp", shape.intermediate_size)) if there is None
        ]
        if missing:
            entry["skip"] = missing
        if entry:
            entries[index] = entry
    return entries


def _added_biases(
    model: PreTrainedModel, config: PretrainedConfig, stock: type, shapes: list[_LayerShape]
) -> dict[str, list[str]]:
    """Layer -> the output projections that carry a bias although the stock class would not give them one."""
    small = copy.deepcopy(config)
    small._attn_implementation = "eager"
    with torch.device("meta"):
        expected = stock(small).model.layers
    added: dict[str, list[str]] = {}
    for index, (layer, plain) in enumerate(zip(model.model.layers, expected, strict=True)):
        _check_scales(layer, plain, index)
        for name in _BIASED:
            parent = name.partition(".")[0]
            if _is_stub(getattr(layer, parent)):
                continue
            linear, stock_linear = layer.get_submodule(name), plain.get_submodule(name)
            if linear.bias is not None and stock_linear.bias is None:
                added.setdefault(str(index), []).append(name)
    return added


def _check_scales(layer: nn.Module, stock: nn.Module, index: int) -> None:
    """Sizes do not say what a layer made of its index; in a shorter model the stock class makes something else."""
    plain = dict(stock.named_modules())
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            other = vars(plain[path]).get(name) if path in plain else None
            if isinstance(value, float) and isinstance(other, float) and value != other:
                raise UnsupportedModelError(
                    f"{type(layer).__name__}: {path}.{name} is {value:.4g}, as in the layer that it was before whole "
                    f"blocks went; a folder would give layer {index} {other:.4g}; use a pruner that removes no blocks"
                )


def _settle_layers(model: PreTrainedModel, shapes: list[_LayerShape], family: PrunedFamily) -> None:
    """Bring the attributes that repeat a size up to date."""
    for layer, shape in zip(model.model.layers, shapes, strict=True):
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        for linear in linears:
            linear.out_features, linear.in_features = linear.weight.shape
        if hasattr(layer.mlp, "intermediate_size"):
            layer.mlp.intermediate_size = shape.intermediate_size
        if shape.heads is not None:
            family.modeling.count_heads(layer.self_attn, shape.heads, shape.kv_heads)


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
    base_causal_lm = stock_classes(stock_type(model_type))[2]
    if not isinstance(model, base_causal_lm):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be pruned: a {base_causal_lm.__name__} is needed; unwrap it first (for "
            "LoRA: merge_and_unload); a model with code of its own can be evaluated (pruner=none), not pruned"
        )
    pruned_family(stock_type(model_type))


def replace_config(model: nn.Module, old: PretrainedConfig, new: PretrainedConfig) -> None:
    """Modules of transformers keep references of their own to the configuration, under varying names."""
    for module in model.modules():
        for name, value in vars(module).items():
            if value is old:
                module.__dict__[name] = new
            elif is_layer_config(value) and vars(value)["config"] is old:
                vars(value)["config"] = new


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


def stock_classes(model_type: str) -> tuple[type, type, type]:
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
        gate, up, down = _gated_linears(layer, f"model type '{model_type}', layer {index}")
        found = (gate.out_features, up.out_features, down.in_features)
        if found != (_PROBE_SIZES["intermediate_size"],) * 3:
            raise UnsupportedModelError(
                f"model type '{model_type}', layer {index}: looked for FFN matrices of width "
                f"config.intermediate_size={_PROBE_SIZES['intermediate_size']}, found {found}"
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
    """transformers logs what a family thinks of sizes that are not its own."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _norms(config_class: type, causal_lm_class: type) -> dict[str, tuple[str, ...]]:
    """Which norms of a layer serve its attention, or its FFN, alone; seen in one pass of a small model."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model: Any = causal_lm_class(config_class(**_PROBE_SIZES)).eval()
    try:
        with watched(model.model.layers[0]) as seen, torch.no_grad():
            model(torch.arange(4)[None], use_cache=False)
    except Exception:  # a family that does not run so: its norms stay, which costs parameters and changes nothing
        return dict.fromkeys(SUBMODULES, ())
    return served(seen, {kind: (name,) for kind, name in SUBMODULES.items()})


def package() -> ModuleType:
    """What the families' modules are in: a folder of this process, as save_pretrained copies the file of a class."""
    with _WRITING:
        found = sys.modules.get(PACKAGE)
        if found is None or not hasattr(found, "__path__"):
            folder = tempfile.mkdtemp(prefix=f"{PACKAGE}_")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            found = ModuleType(PACKAGE, "The classes of pruned families; see cfsp.models.remote_code.")
            found.__path__ = [folder]
            sys.modules[PACKAGE] = found
        return found
