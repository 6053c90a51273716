"""Run something as soon as a module has been imported, whoever imports it and whenever that is."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import suppress


def when_imported(name: str, action: Callable[[], object]) -> None:
    """Call `action()` now if the module `name` is loaded, else right after its first successful import."""
    if name in sys.modules:
        importlib.import_module(name)  # another thread may still be at it: wait
        action()
    else:
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder:
    """Finds its one module as the other finders do, runs the action behind its execution, and leaves no trace."""

    def __init__(self, name: str, action: Callable[[], object]):
        self._name = name
        self._action = action
        self._searching = False

    def find_spec(self, name, path=None, target=None):
        if name != self._name or self._searching:
            return None
        self._searching = True  # a finder like this one may ask us again
        try:
            found = (finder.find_spec(name, path, target) for finder in list(sys.meta_path) if finder is not self)
            spec = next((spec for spec in found if spec is not None), None)
        finally:
            self._searching = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            self._follow(spec.loader)
        return spec

    def _follow(self, loader) -> None:
        execute = loader.exec_module

        def exec_module(module):
            execute(module)
            vars(loader).pop("exec_module", None)
            with suppress(ValueError):
                sys.meta_path.remove(self)
            self._action()

        loader.exec_module = exec_module
