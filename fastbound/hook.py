"""Run an action once another package is imported, without importing that package here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _After(MetaPathFinder):
    """Finds one module through the other finders, and runs an action after it has executed."""

    def __init__(self, module: str, action: Callable[[], None]) -> None:
        self.module, self.action = module, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
            self.action()

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


def after_import(module: str, action: Callable[[], None]) -> None:
    """Run `action` now if the module is already imported, otherwise right after its import."""
    waiting = any(isinstance(f, _After) and f.module == module for f in sys.meta_path)
    if module in sys.modules:
        action()
    elif not waiting:
        sys.meta_path.insert(0, _After(module, action))
