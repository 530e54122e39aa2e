"""cfsp: structured pruning of large language models.

Example:
    >>> import cfsp
    >>> model, tokenizer = cfsp.load("path/to/model")
    >>> plan = cfsp.prune(model, input_ids, pruner="cfsp", ratio=0.5)
    >>> model = cfsp.apply(model, plan)
"""

from __future__ import annotations

from cfsp.system import interrupts as _interrupts

_interrupts.quiet_command()  # before the imports that take time

from typing import TYPE_CHECKING, Any  # noqa: E402

from cfsp.pruned_model.registration import register as _register  # noqa: E402

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cfsp.api import prune
    from cfsp.model.load import load
    from cfsp.plan.pruning_plan import PruningPlan
    from cfsp.pruner.apply import apply

#: Public name -> its module, imported on first use (start-up time): `cfsp --help` needs neither torch nor transformers.
_PUBLIC = {
    "prune": "cfsp.api",
    "apply": "cfsp.pruner.apply",
    "load": "cfsp.model.load",
    "PruningPlan": "cfsp.plan.pruning_plan",
}

_register()

__all__ = ["PruningPlan", "__version__", "apply", "load", "prune"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cfsp' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value
