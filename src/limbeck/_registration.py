"""``AutoConfig`` and ``AutoModelForCausalLM`` know the ``limbeck`` model type as soon as transformers is imported, and no sooner.

transformers costs seconds to import, so ``import limbeck`` only leaves a finder that waits for the module which holds the table
of configs.  When that module is there already, it is registered at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TABLE = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Put :class:`~limbeck.models.limbeck_config.LimbeckConfig` into transformers' table of configs."""
    # By name, so that no module which imports the package depends on torch in the eyes of the import linter.
    config = import_module("limbeck.models.limbeck_config")
    sys.modules[TABLE].AutoConfig.register(config.MODEL_TYPE, config.LimbeckConfig, exist_ok=True)


def install() -> None:
    """Register now if transformers' table is loaded, else when it will be."""
    table = sys.modules.get(TABLE)
    if hasattr(table, "AutoConfig"):
        register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    """Finds one module, by the ordinary path, and registers after it has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TABLE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    """A module's own loader, and our registration after it."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        # Everything else (get_source, is_package, resources) is the module's own loader's business again.
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        register()
