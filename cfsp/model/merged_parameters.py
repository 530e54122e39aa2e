"""Parameters that a checkpoint holds in several tensors or under another name, as transformers' own mapping says.

A published mixture holds a matrix for each expert; in memory all experts lie in one parameter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.weights.shards import Shards


@dataclass(frozen=True)
class MergedParameters:
    """The stored tensors of the parameters that have no tensor of their own name in a checkpoint.

    Attributes:
        model: the model, with parameters on the meta device.
        shards: the checkpoint.
        parts: name of the parameter -> (name of a stored tensor, pattern of the mapping that it met; None: it is only
            renamed), in the order in which they are merged.
        converters: those of transformers for the model as it was loaded; a pruned class has none of its own.
    """

    model: Any
    shards: Shards
    parts: dict[str, list[tuple[str, str | None]]] = field(default_factory=dict)
    converters: tuple[Any, ...] = ()

    @classmethod
    def of(cls, model: Any, shards: Shards) -> MergedParameters:
        """Find the stored tensors of the parameters of a model with mixtures; other models need none."""
        # Start-up time: loads transformers' models.
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        mapping = get_model_conversion_mapping(model) or []
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        found = cls(model, shards, converters=tuple(converters))
        for stored in sorted(shards.shapes, key=dot_natural_key):
            if stored in parameters:
                continue
            name, pattern = rename_source_key(stored, renamings, converters)
            if name in parameters and name not in shards:
                found.parts.setdefault(name, []).append((stored, pattern))
        return found

    def read(self, names: Collection[str], stored_of: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters by name, on the CPU: first those with a tensor of their own, in the order on disk.

        Args:
            names: names of parameters.
            stored_of: name -> the one tensor that holds it.
        """
        own = {stored_of[name]: name for name in names if name in stored_of}
        for stored in self.shards.in_order(own):
            yield own[stored], self.shards.read(stored)
        for name in names:
            if name not in stored_of:
                yield name, self._merged(name)

    def _merged(self, name: str) -> Tensor:
        read = {stored: self.shards.read(stored) for stored in self.shards.in_order(s for s, _ in self.parts[name])}
        patterns = [pattern for _, pattern in self.parts[name]]
        if patterns[0] is None:
            return read[self.parts[name][0][0]]
        converter = deepcopy(next(entry for entry in self.converters if patterns[0] in entry.source_patterns))
        for stored, pattern in self.parts[name]:
            converter.add_tensor(name, stored, pattern, read.pop(stored))
        merged = converter.convert(name, model=self.model, config=self.model.config)[name]
        tensor: Tensor = merged[0] if isinstance(merged, list) else merged
        return tensor
