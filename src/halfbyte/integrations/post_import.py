"""Runs an action right after a module was imported, or now if it is loaded already."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["PostImportFinder", "after_import"]


class PostImportFinder:
    """Stands first on ``sys.meta_path``; finds nothing itself but listens to what the others find."""

    def __init__(self) -> None:
        self.actions: dict[str, Callable[[], None]] = {}
        self.started: list[tuple[str, Callable[[], None]]] = []
        """Actions for modules whose own import was under way when they were asked for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec another finder has for a module that is waited for, with the action behind its execution."""
        del path, target
        self._catch_up()
        action = self.actions.pop(fullname, None)
        if action is None:
            return None
        # The parents are imported by now, and the action is off the list: this ends with the other finders.
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            self.actions[fullname] = action
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            action()

        spec.loader.exec_module = exec_module
        return spec

    def _catch_up(self) -> None:
        for entry in [entry for entry in self.started if not _is_under_way(entry[0])]:
            self.started.remove(entry)
            entry[1]()


def _is_under_way(module: str) -> bool:
    return bool(getattr(getattr(sys.modules.get(module), "__spec__", None), "_initializing", False))


_finder = PostImportFinder()


def after_import(module: str, action: Callable[[], None]) -> None:
    """Run ``action`` once ``module`` has been imported: now, or right after its first import.

    Where that import is under way (the module imports the caller), at the first import of anything after it.

    >>> after_import("json", lambda: print("json is there"))
    json is there
    """
    if module in sys.modules and not _is_under_way(module):
        action()
        return
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)  # pyright: ignore[reportArgumentType]
    if module in sys.modules:
        _finder.started.append((module, action))
    else:
        _finder.actions[module] = action
