"""Names of implementations in transformers' configurations, and functions of its modules, replaced while steps run."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import contextmanager
from typing import Any


class Switch:
    """`with switch(configs):` every config (or other object) in `configs` has `name` in its attribute `attribute`.

    Models may share a config object and step in several threads: the last one out restores it.
    """

    def __init__(self, attribute: str, name: Any):
        self.attribute, self.name = attribute, name
        self._original: dict[int, Any] = {}  # id(config) -> what it had, while a step runs
        self._users: Counter = Counter()  # id(config) -> steps that run on it now
        self._guard = threading.Lock()

    def original(self, config) -> Any:
        """What the config names when no step runs; None for no other name than ours."""
        name = self._original.get(id(config), getattr(config, self.attribute, None))
        return None if name == self.name else name

    @contextmanager
    def __call__(self, configs: list):
        with self._guard:
            for config in configs:
                if not self._users[id(config)]:
                    self._original[id(config)] = getattr(config, self.attribute)
                    setattr(config, self.attribute, self.name)
                self._users[id(config)] += 1
        try:
            yield
        finally:
            with self._guard:
                for config in configs:
                    self._users[id(config)] -= 1
                    if not self._users[id(config)]:
                        setattr(config, self.attribute, self._original.pop(id(config)))
                        del self._users[id(config)]
