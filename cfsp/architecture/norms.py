"""Norms that serve only the attention, or only the FFN, of a layer, recognised from the tensors of one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

Kind = TypeVar("Kind", bound=str)


@dataclass(frozen=True)
class LayerStates:
    """Hidden states at the children of a layer.

    Attributes:
        layer: the layer.
        entered: name of a child -> the state that entered it.
        left: name of a child -> the state that left it.
    """

    layer: nn.Module
    entered: dict[str, Tensor] = field(default_factory=dict)
    left: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def watched(layer: nn.Module) -> Iterator[LayerStates]:
    """Record the hidden states at the children of ``layer`` while it runs."""
    inputs = LayerStates(layer)

    def watch(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs.entered[name] = args[0] if args else kwargs["hidden_states"]
            inputs.left[name] = output[0] if isinstance(output, tuple) else output

        return note

    handles = [child.register_forward_hook(watch(name), with_kwargs=True) for name, child in layer.named_children()]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def served(inputs: LayerStates, submodules: Mapping[Kind, tuple[str, ...]]) -> dict[Kind, tuple[str, ...]]:
    """Return the names of the norms that serve each kind of submodule alone.

    A norm belongs to a submodule if the norm's output enters it, or the norm's input left it. A norm that feeds both
    submodules belongs to neither.

    Args:
        inputs: hidden states of one pass through the layer.
        submodules: kind -> names of the children that it is made of; the output of the first is the submodule's.
    """
    inside = {name for names in submodules.values() for name in names}
    norms: dict[Kind, set[str]] = {kind: set() for kind in submodules}
    for name, output in inputs.left.items():
        if name in inside or not list(inputs.layer.get_submodule(name).parameters()):
            continue
        for kind, names in submodules.items():
            into = any(output is inputs.entered.get(part) for part in names)
            if into or inputs.entered[name] is inputs.left.get(names[0]):
                norms[kind].add(name)
    shared = set.intersection(*norms.values())
    return {kind: tuple(sorted(names - shared)) for kind, names in norms.items()}
