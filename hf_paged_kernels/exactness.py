"""Exact mode: what runs in this thread gives a row the same bits beside whatever others.

Kernels whose order of sums depends on the batch step aside for others while it is on. A thread-local, since it is for all the
kernels of a forward, in whatever module they are called.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager

_state = threading.local()


@contextmanager
def exact(on: bool = True):
    """Exact mode is on, or off, while inside."""
    before, _state.on = is_exact(), on
    try:
        yield
    finally:
        _state.on = before


def is_exact() -> bool:
    return getattr(_state, "on", False)
