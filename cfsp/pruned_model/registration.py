"""Registration of pruned models with transformers on ``import cfsp``, without ``trust_remote_code`` and slow imports.

The classes of a family take seconds to build. So they are built when transformers asks for their model_type, and their
modules are written when a pickle names one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from cfsp.pruned_model.names import PACKAGE, PRUNED_PREFIX

_AUTO = "transformers.models.auto.configuration_auto"


class _LazyFamilies(dict[str, Any]):
    """Mapping of the registered configurations, which builds that of a pruned family at the first lookup."""

    def __contains__(self, model_type: object) -> bool:
        return super().__contains__(model_type) or self._is_ours(model_type)

    def __missing__(self, model_type: str) -> Any:
        if not self._is_ours(model_type):
            raise KeyError(model_type)
        from cfsp.pruned_model.family import pruned_family

        return pruned_family(model_type.removeprefix(PRUNED_PREFIX)).config_class

    @staticmethod
    def _is_ours(model_type: object) -> bool:
        if not isinstance(model_type, str) or not model_type.startswith(PRUNED_PREFIX):
            return False
        from cfsp.pruned_model.names import COMMON_FAMILIES

        return model_type.removeprefix(PRUNED_PREFIX) in COMMON_FAMILIES


def register() -> None:
    """Register the families now if transformers is imported, else as soon as it is."""
    module = sys.modules.get(_AUTO)
    if module is not None:
        _extend_mapping(module)
    if not any(isinstance(finder, _FamilyFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _FamilyFinder())


def _extend_mapping(module: ModuleType) -> None:
    mapping = getattr(module, "CONFIG_MAPPING", None)
    known = getattr(mapping, "_extra_content", None)
    # Another version may keep them elsewhere; then cfsp.load and trust_remote_code=True still work.
    if isinstance(known, dict) and not isinstance(known, _LazyFamilies):
        mapping._extra_content = _LazyFamilies(known)  # type: ignore[union-attr]


class _FamilyFinder(MetaPathFinder):
    """Extends transformers' table of configurations once it is imported, and finds the modules of the families."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of the families' package, or that of transformers' table; None for all other modules."""
        if name == PACKAGE:
            return ModuleSpec(name, _PackageLoader(), is_package=True)
        if name.startswith(f"{PACKAGE}."):
            from cfsp.pruned_model.family import write_module

            write_module(name)
            return None  # the other finders look in the package's folder
        if name != _AUTO:
            return None
        spec = self._others_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ExtendingLoader(spec.loader)
        return spec

    def _others_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        """Return the spec of the first other finder that knows the module; it need not be PathFinder."""
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                return spec
        return None


class _PackageLoader(Loader):
    """Loads the families' package: the existing one, or a new one in a folder of this process."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the package."""
        from cfsp.pruned_model.family import package

        return package()

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing; the package has no code."""


class _ExtendingLoader(Loader):
    """Loads a module with another loader, and extends its table afterwards."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module with the other loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module with the other loader, then extend its table."""
        self._loader.exec_module(module)
        _extend_mapping(module)

    def __getattr__(self, name: str) -> Any:  # get_source and the like, for tracebacks
        # A copy is asked for these before it has a loader, which would ask here again, without end.
        if name == "_loader" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return getattr(self._loader, name)
