"""Tensors of a model to be saved, in the order of its checkpoint: from memory, or read from disk block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from cfsp.architecture.views import resolve
from cfsp.architecture.weights import weights_of
from cfsp.errors import CheckpointError
from cfsp.model.streamed import StreamedWeights
from cfsp.pruned_model.family import PRUNED_PREFIX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cfsp.architecture.views import BlockView

#: Called with each block whose weights are read from disk, while they are in memory.
Visit = Callable[["BlockView"], None]
#: Name, shape and dtype of a tensor.
Entry = tuple[str, tuple[int, ...], torch.dtype]


class TensorSource(Protocol):
    """Tensors of a model to be saved.

    Attributes:
        reads_blocks: blocks are read from disk to be written, so a stopped save is worth resuming.
    """

    reads_blocks: bool

    def entries(self) -> Iterable[Entry]:
        """Return the tensors in the order of the checkpoint, tied ones once."""

    def values(self, names: Sequence[str], visit: Visit | None) -> Iterator[tuple[str, Tensor]]:
        """Yield name and value of tensors, in the order of ``names``.

        Args:
            names: names in the checkpoint; those of a block stand together.
            visit: called with each block that is read.
        """


def tensors_of(model: PreTrainedModel) -> TensorSource:
    """Return the tensors of a model, wherever its weights are.

    Raises:
        CheckpointError: a tensor has no data.
    """
    weights = weights_of(model)
    if isinstance(weights, StreamedWeights):
        return _Streamed(weights)
    if weights.is_streamed:
        raise CheckpointError(f"weights of the kind {type(weights).__name__} cannot be saved")
    return _InMemory(model)


class _InMemory:
    reads_blocks = False

    def __init__(self, model: PreTrainedModel) -> None:
        self._tensors = _unique_tensors(model)

    def entries(self) -> Iterable[Entry]:
        return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()]

    def values(self, names: Sequence[str], visit: Visit | None) -> Iterator[tuple[str, Tensor]]:
        return ((name, self._tensors[name]) for name in names)


class _Streamed:
    reads_blocks = True

    def __init__(self, weights: StreamedWeights) -> None:
        self._weights, self._model = weights, weights.model

    def entries(self) -> Iterable[Entry]:
        seen: set[int] = set()
        tied = set(self._model._tied_weights_keys or ())
        parameters = _stored_form(self._model, dict(self._model.named_parameters(remove_duplicate=False)))
        for name, parameter in sorted(parameters.items(), key=lambda item: item[0] in tied):
            if id(parameter) not in seen:
                yield name, tuple(parameter.shape), parameter.dtype
            seen.add(id(parameter))

    def values(self, names: Sequence[str], visit: Visit | None) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors; each block is read once."""
        blocks = resolve(self._model).blocks
        prefixes = {
            f"{name}.": block
            for name, module in self._model.named_modules()
            for block in blocks
            if block.module is module
        }
        current: tuple[str, Mapping[str, Tensor]] | None = None
        for name in names:
            prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
            if prefix is None:
                yield name, self._weights.read_outside_blocks(name)
                continue
            if current is None or current[0] != prefix:
                current = None
                block = prefixes[prefix]
                with self._weights.resident(block):
                    if visit is not None:
                        visit(block)
                    parameters = {prefix + path: value.detach() for path, value in block.module.named_parameters()}
                    current = (prefix, _stored_form(self._model, parameters))
            yield name, current[1][name]


def _stored_form(model: PreTrainedModel, tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """Return tensors of a streamed model as its published checkpoints hold them: a mixture has a matrix per expert."""
    if not resolve(model).mixtures or model.config.model_type.startswith(PRUNED_PREFIX):
        return tensors
    from transformers.core_model_loading import revert_weight_conversion

    stored: Mapping[str, Tensor] = revert_weight_conversion(model, tensors)
    return stored


def _unique_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the state dict with tied tensors kept once, under the name that transformers ties the others to."""
    tied = set(model._tied_weights_keys or ())
    state = _as_stored(model)
    unique: dict[str, Tensor] = {}
    seen: set[tuple[torch.device, int]] = set()
    for name in sorted(state, key=lambda name: name in tied):
        tensor = state[name]
        if tensor.is_meta:
            raise CheckpointError(f"cannot save this model: {name} has no data (it is on the meta device)")
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        if storage not in seen:
            unique[name] = tensor
        elif name not in tied:
            # transformers does not know of this sharing, so nothing would tie the tensor again on loading.
            unique[name] = tensor.clone()
        seen.add(storage)
    return unique


def _as_stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the state dict; that of a stock class under the names and in the shapes of its published checkpoints.

    transformers stacks the matrices of experts when it loads them, for instance. A class of cfsp has no such mapping.
    """
    state = model.state_dict()
    if model.config.model_type.startswith(PRUNED_PREFIX) or any(tensor.is_meta for tensor in state.values()):
        return state
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, state)
