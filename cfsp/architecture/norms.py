"""Which norms of a layer serve its attention, or its FFN, alone: seen in one pass, by what enters and leaves whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

Kind = TypeVar("Kind", bound=str)


@dataclass(frozen=True)
class Seen:
    """The hidden states that entered and left each child of ``layer``, by its name."""

    layer: nn.Module
    entered: dict[str, Tensor] = field(default_factory=dict)
    left: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def watched(layer: nn.Module) -> Iterator[Seen]:
    """Note what enters and leaves the children of ``layer`` while it runs."""
    seen = Seen(layer)

    def watch(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen.entered[name] = args[0] if args else kwargs["hidden_states"]
            seen.left[name] = output[0] if isinstance(output, tuple) else output

        return note

    handles = [child.register_forward_hook(watch(name), with_kwargs=True) for name, child in layer.named_children()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def served(seen: Seen, submodules: Mapping[Kind, tuple[str, ...]]) -> dict[Kind, tuple[str, ...]]:
    """Kind of submodule -> names of the norms that serve it alone.

    A norm whose output enters the submodule, or whose input left it, belongs to it; one that feeds both to neither.

    Args:
        submodules: kind -> names of the children that it is made of; the output of the first is the submodule's.
    """
    inside = {name for names in submodules.values() for name in names}
    found: dict[Kind, set[str]] = {kind: set() for kind in submodules}
    for name, output in seen.left.items():
        if name in inside or not list(seen.layer.get_submodule(name).parameters()):
            continue
        for kind, names in submodules.items():
            into = any(output is seen.entered.get(part) for part in names)
            if into or seen.entered[name] is seen.left.get(names[0]):
                found[kind].add(name)
    shared = set.intersection(*found.values())
    return {kind: tuple(sorted(names - shared)) for kind, names in found.items()}
