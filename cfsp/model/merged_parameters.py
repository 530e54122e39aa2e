"""Parameters that a checkpoint stores as several tensors or under another name.

A published mixture of experts stores one matrix for each expert. In memory, one parameter holds all experts. The
mapping is that of transformers.
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
    """Parameters without a stored tensor of the same name, and the stored tensors that they are built from.

    Attributes:
        model: the model, with parameters on the meta device.
        shards: the checkpoint.
        parts: name of a parameter -> its stored tensors in the order in which they are merged. Each is given by its
            name and the pattern of the mapping that matches it. The pattern is None for a tensor that is only renamed.
        converters: converters of transformers for the model before pruning; a pruned class has none of its own.
    """

    model: Any
    shards: Shards
    parts: dict[str, list[tuple[str, str | None]]] = field(default_factory=dict)
    converters: tuple[Any, ...] = ()

    @classmethod
    def find(cls, model: Any, shards: Shards) -> MergedParameters:
        """Return the merged parameters of a model with mixtures of experts; other models have none."""
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
        merged = cls(model, shards, converters=tuple(converters))
        for stored in sorted(shards.shapes, key=dot_natural_key):
            if stored in parameters:
                continue
            name, pattern = rename_source_key(stored, renamings, converters)
            if name in parameters and name not in shards:
                merged.parts.setdefault(name, []).append((stored, pattern))
        return merged

    def read(self, names: Collection[str], stored_by_name: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
        """Yield name and value of parameters, on the CPU.

        Parameters that a single tensor stores come first, in the order on disk.

        Args:
            names: names of parameters.
            stored_by_name: name of a parameter -> name of the single tensor that stores it.
        """
        own = {stored_by_name[name]: name for name in names if name in stored_by_name}
        for stored in self.shards.in_order(own):
            yield own[stored], self.shards.read(stored)
        for name in names:
            if name not in stored_by_name:
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
