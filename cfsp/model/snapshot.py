"""Snapshots of a model's modules, parameters and attributes, which undo later replacements."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

_TABLES = ("_modules", "_parameters", "_buffers")


class Snapshot:
    """Classes, submodules, parameters and attributes of a model at one moment; values are shared, not copied.

    :meth:`restore` undoes later replacements of modules, parameters and attributes, but not writes into the values of
    a parameter.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._parts = [(module, type(module), _copy_attributes(module)) for module in model.modules()]

    def restore(self) -> None:
        """Bring the model back to the state of the snapshot."""
        for module, cls, attributes in self._parts:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(
                {name: dict(value) if name in _TABLES else value for name, value in attributes.items()}
            )

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters, each once."""
        tables = [attributes["_parameters"] for *_, attributes in self._parts]
        return list({id(p): p for table in tables for p in table.values() if p is not None}.values())

    @contextmanager
    def active(self) -> Iterator[None]:
        """Restore the snapshot within the context, and the present state afterwards."""
        now = Snapshot(self.model)
        self.restore()
        try:
            yield
        finally:
            now.restore()

    @contextmanager
    def parked(self) -> Iterator[None]:
        """Keep parameters that only the snapshot holds in CPU memory within the context, then move them back."""
        now = {id(parameter) for parameter in self.model.parameters()}
        away = [(p, p.device) for p in self.parameters() if id(p) not in now]
        for parameter, _ in away:
            parameter.data = parameter.data.cpu()
        try:
            yield
        finally:
            for parameter, device in away:
                parameter.data = parameter.data.to(device)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Undo all replacements of modules, parameters and attributes at the end of the context."""
    snapshot = Snapshot(model)
    try:
        yield
    finally:
        snapshot.restore()


@contextmanager
def without_hooks(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Remove the forward hooks of ``modules`` within the context, and restore them afterwards."""
    saved = [(module, module._forward_hooks, module._forward_pre_hooks) for module in modules]
    for module in modules:
        module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, hooks, pre_hooks in saved:
            module._forward_hooks, module._forward_pre_hooks = hooks, pre_hooks


def clone_module(module: nn.Module, *, own_values: bool = False) -> nn.Module:
    """Return a copy of a module without its hooks, whose submodules can be replaced.

    Args:
        module: the module.
        own_values: copy the values of parameters and buffers; otherwise both modules share them.
    """
    shared = [] if own_values else [*module.parameters(), *module.buffers()]
    with without_hooks([*module.modules()]):
        return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


def _copy_attributes(module: nn.Module) -> dict[str, Any]:
    return {name: dict(value) if name in _TABLES else value for name, value in module.__dict__.items()}
