"""Public interface for authors of components: the decorator, and the contract of each kind.

A component is one class and one YAML file; ``docs/extending.md`` has an example of each kind. The code is in
:mod:`cfsp.config.components` and :mod:`cfsp.config.contracts`. Nothing in cfsp imports this module.

Example:
    A metric in a package of your own, chosen with ``importance._target_=mine.Mine plugins.allow=[mine]``::

        from cfsp.components import NeuronImportance, component

        @component
        class Mine(NeuronImportance):
            def score(self, channels, activation):
                return activation.rms
"""

from cfsp.config.components import component
from cfsp.config.contracts import (
    Allocator,
    Evaluator,
    Fitness,
    Launcher,
    NeuronImportance,
    Pruner,
    Recovery,
    RunLogger,
    SearchingAllocator,
)
from cfsp.config.deciding import Decides, deciding_settings

__all__ = [
    "Allocator",
    "Decides",
    "Evaluator",
    "Fitness",
    "Launcher",
    "NeuronImportance",
    "Pruner",
    "Recovery",
    "RunLogger",
    "SearchingAllocator",
    "component",
    "deciding_settings",
]
