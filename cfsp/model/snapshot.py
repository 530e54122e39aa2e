"""Which modules, parameters and attributes a model is made of, to be brought back after they were swapped."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

_TABLES = ("_modules", "_parameters", "_buffers")


class Snapshot:
    """The make-up of ``model`` as it is now: classes, submodules, parameters, attributes; values shared, not copied.

    What replaces a module, a parameter or an attribute later is undone by :meth:`restore`; what is written into a
    parameter's values is not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._made_of = [(module, type(module), _attributes(module)) for module in model.modules()]

    def restore(self) -> None:
        """Bring everything back."""
        for module, cls, attributes in self._made_of:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(
                {name: dict(value) if name in _TABLES else value for name, value in attributes.items()}
            )

    @contextmanager
    def active(self) -> Iterator[None]:
        """As it was then, for a while; afterwards as it is now."""
        now = Snapshot(self.model)
        self.restore()
        try:
            yield
        finally:
            now.restore()

    @contextmanager
    def parked(self) -> Iterator[None]:
        """Parameters that the model had then and has no more wait in the CPU's memory for a while."""
        now = {id(parameter) for parameter in self.model.parameters()}
        then = {id(p): p for *_, made_of in self._made_of for p in made_of["_parameters"].values() if p is not None}
        away = [(p, p.device) for key, p in then.items() if key not in now]
        for parameter, _ in away:
            parameter.data = parameter.data.cpu()
        try:
            yield
        finally:
            for parameter, device in away:
                parameter.data = parameter.data.to(device)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Whatever is swapped inside is undone at the end."""
    snapshot = Snapshot(model)
    try:
        yield
    finally:
        snapshot.restore()


@contextmanager
def hooks_aside(modules: Sequence[nn.Module]) -> Iterator[None]:
    """``modules`` are without their hooks for a while."""
    aside = [(module, module._forward_hooks, module._forward_pre_hooks) for module in modules]
    for module in modules:
        module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, hooks, pre_hooks in aside:
            module._forward_hooks, module._forward_pre_hooks = hooks, pre_hooks


def twin_of(module: nn.Module, *, own_values: bool = False) -> nn.Module:
    """A copy without anybody's hooks, to swap modules in; its values are those of ``module`` unless it gets its own."""
    kept = [] if own_values else [*module.parameters(), *module.buffers()]
    with hooks_aside([*module.modules()]):
        return copy.deepcopy(module, {id(tensor): tensor for tensor in kept})


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: dict(value) if name in _TABLES else value for name, value in module.__dict__.items()}
