"""A re-entrant lock that is handed on in the order it was asked for.

Python's own locks are not fair: a thread that steps in a loop takes its lock back before a waiting `add` wakes up.
"""

from __future__ import annotations

import threading
from collections import deque


class FairLock:
    """Use as a context manager; the same thread may enter again."""

    def __init__(self):
        self._mutex = threading.Lock()
        self._waiters: deque[tuple[int, threading.Lock]] = deque()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self):
        me = threading.get_ident()
        with self._mutex:
            if self._owner == me:
                self._depth += 1
                return self
            if self._owner is None:
                self._owner, self._depth = me, 1
                return self
            gate = threading.Lock()
            gate.acquire()
            self._waiters.append((me, gate))
        try:
            gate.acquire()  # the releasing thread has made us the owner when this returns
        except BaseException:  # interrupted while waiting
            self._leave_queue(gate)
            raise
        return self

    def _leave_queue(self, gate: threading.Lock) -> None:
        with self._mutex:
            for waiter in self._waiters:
                if waiter[1] is gate:
                    self._waiters.remove(waiter)
                    return
        self.__exit__()  # ownership had just been handed to us

    def __exit__(self, *exc_info):
        with self._mutex:
            self._depth -= 1
            if self._depth:
                return
            if not self._waiters:
                self._owner = None
                return
            self._owner, gate = self._waiters.popleft()
            self._depth = 1
            gate.release()
