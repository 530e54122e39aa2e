"""Fit of the tensors in a checkpoint's headers to an architecture: places, tied tensors and dtypes.

The tensors decide, not config.json: a head that is stored beside the embedding with other values is a head of its own,
whatever ``tie_word_embeddings`` says. Names are compared after the renamings that transformers makes when it loads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cfsp.errors import CheckpointError
from cfsp.weights.shards import Shards

#: Stored dtypes of parameters, as safetensors names them.
FLOATS = ("F64", "F32", "F16", "BF16")
#: Buffers in old checkpoints that transformers computes itself.
_OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
_ATTENTION_MASK = re.compile(r"(^|\.)(attn|attention|self_attn|self_attention)\.(masked_bias|bias)$")


@dataclass(frozen=True)
class Fit:
    """Places of a checkpoint's tensors in an architecture.

    Attributes:
        targets: stored name -> name in the model's state dict.
        converted: stored names that transformers merges, splits or transposes when it loads, so that their shapes are
            not those of the targets.
        unexpected: stored names without a place.
    """

    targets: Mapping[str, str]
    converted: frozenset[str]
    unexpected: tuple[str, ...]


def fit_of(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> Fit:
    """Find the place of each stored tensor in a model, by the same rules as transformers.

    Args:
        model: the model, which may be on the meta device.
        shapes: stored name -> shape.

    Raises:
        CheckpointError: two stored tensors have the same place.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()
    targets: dict[str, str] = {}
    converted: set[str] = set()
    unexpected: list[str] = []
    taken: dict[str, str] = {}
    ignored = _ignored(model)
    for name, shape in shapes.items():
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target not in state:
            if not any(ignored.search(other) for other in (name, target)) and not is_computed(name, shape):
                unexpected.append(name)
            continue
        targets[name] = target
        if pattern is not None:
            converted.add(name)
        elif taken.setdefault(target, name) != name:
            raise CheckpointError(f"{taken[target]} and {name} are two tensors for the same weight, {target}")
    return Fit(targets, frozenset(converted), tuple(unexpected))


def _ignored(model: Any) -> re.Pattern[str]:
    """Return a pattern of the stored names that transformers leaves out silently.

    They belong to further prediction layers, or to other parts of a larger model.
    """
    patterns = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *_OLD_BUFFERS]
    return re.compile("|".join(f"({pattern})" for pattern in patterns))


def is_computed(name: str, shape: Sequence[int]) -> bool:
    """Return whether a stored tensor is a buffer of old checkpoints that every model computes itself.

    Such buffers are rotary frequencies, positions, causal masks [1, 1, T, T] and the value of masked positions.
    """
    if any(re.search(pattern, name) for pattern in _OLD_BUFFERS):
        return True
    mask = _ATTENTION_MASK.search(name)
    if mask is None:
        return False
    if mask[3] == "masked_bias":
        return len(shape) == 0 or list(shape) == [1]
    return len(shape) == 4 and list(shape[:2]) == [1, 1] and shape[2] == shape[3]


def without_place(model: Any, names: Iterable[str]) -> list[str]:
    """Return those of the stored names without a place that are no buffers which transformers computes itself."""
    ignored = _ignored(model)
    return [name for name in sorted(names) if not ignored.search(name) and not _ATTENTION_MASK.search(name)]


def check_places(fit: Fit, where: str) -> None:
    """Refuse a checkpoint with tensors that have no place in the architecture.

    Raises:
        CheckpointError: a stored tensor has no place, so the loaded model would differ from the saved one.
    """
    if fit.unexpected:
        count = len(fit.unexpected)
        subject = "1 tensor has" if count == 1 else f"{count:,} tensors have"
        raise CheckpointError(
            f"{where}: {subject} no place in the architecture that config.json describes, first {fit.unexpected[0]}; "
            "config.json lacks a setting (e.g. attention_bias=true), or the weights are another model's"
        )


def check_floats(model: Any, fit: Fit, dtypes: Mapping[str, str], where: str) -> None:
    """Refuse a checkpoint that stores something else than floats for a parameter of floats.

    Raises:
        CheckpointError: integers or packed values are stored for such a parameter.
    """
    parameters = {name for name, tensor in model.named_parameters(remove_duplicate=False) if tensor.is_floating_point()}
    wrong = [name for name, target in fit.targets.items() if target in parameters and dtypes[name] not in FLOATS]
    if wrong:
        raise CheckpointError(
            f"{where}: {wrong[0]} is stored as {dtypes[wrong[0]]} where a weight has F32, F16 or BF16 ({len(wrong):,} "
            "such weights): quantised or damaged; give the model before quantisation, or fetch it again"
        )


def tied_differently(model: Any, fit: Fit, shards: Shards) -> list[tuple[str, str]]:
    """Return the pairs of stored names that ``model`` holds in one parameter although their tensors differ."""
    stored: dict[int, list[str]] = {}
    places = {target: name for name, target in fit.targets.items() if name not in fit.converted}
    for target, parameter in model.named_parameters(remove_duplicate=False):
        if target in places:
            stored.setdefault(id(parameter), []).append(places[target])
    return [(first, other) for first, *copies in stored.values() for other in copies if not shards.equal(first, other)]


def missing_weights(model: Any, fit: Fit) -> list[str]:
    """Return the parameters that no stored tensor fills.

    The list is empty where transformers converts tensors, because only transformers knows their targets.
    """
    if fit.converted:
        return []
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    filled = set(fit.targets.values())
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    return [
        names[0]
        for names in tied.values()
        if not filled & set(names) and not any(pattern.search(names[0]) for pattern in ignored)
    ]


def majority_dtype(entries: Iterable[tuple[str, int]]) -> str | None:
    """Return the floating-point dtype that most bytes are stored in, as torch names it; None without any.

    Args:
        entries: (dtype as safetensors names it, bytes) of each tensor.
    """
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    sizes: dict[str, int] = {}
    for dtype, size in entries:
        if dtype in names:
            sizes[dtype] = sizes.get(dtype, 0) + size
    return names[max(sizes, key=lambda dtype: sizes[dtype])] if sizes else None


def untie(config: Any) -> None:
    """Set a transformers configuration to an LM head that is not tied to the embedding."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for section in {id(section): section for section in (config, text)}.values():
        if hasattr(section, "tie_word_embeddings"):
            section.tie_word_embeddings = False
