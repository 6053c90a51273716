"""Whether the other ranks are still there: a small sum over all ranks, again and again, in a thread of its own.

A rank that dies breaks its connections, and the sum fails at once. One that hangs (the process is stopped, the machine is
gone) lets it run into its timeout. One that fails puts what happened into the sum, so that all know why they end; one that
ends well, that it leaves.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ..base.errors import ParallelError

INTERVAL = 0.25  # seconds between two beats
GRACE = 10.0  # seconds the main thread has to end by itself when the team has failed, before the process is ended
NEWS = 1.0  # seconds in which the others' reason arrives, where this rank only saw a connection break
MESSAGE = 512  # bytes
BEATING, LEAVING, FAILED = 0, 1, 2


class Heart:
    """
    Args:
        group: a gloo group of its own, whose timeout is how long a silent rank is waited for.

    Attributes:
        error: what ended the team, or None.
    """

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int):
        self.error: str | None = None
        self._group, self._rank, self._size = group, rank, size
        self._own: str | None = None  # why this rank fails
        self._leaving = self._parting = False  # this rank leaves; the others may
        self._engaged = 0
        self._failed = threading.Event()
        self._beat = threading.Event()
        self._callbacks: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._run, name="hf_paged-heart", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # a thread in the middle of a sum would make the process abort

    def on_failure(self, callback: Callable[[], None]) -> None:
        """Call it, in the heart's thread, when the team fails."""
        self._callbacks.append(callback)

    @contextmanager
    def engaged(self):
        """Scope in which this rank must not be left waiting: if the team fails, the process ends unless it leaves soon."""
        self._engaged += 1
        try:
            yield
        finally:
            self._engaged -= 1

    def fail(self, reason: str) -> None:
        """This rank cannot go on; all will know."""
        if self._own is None and self.error is None:
            self._own = reason
            self._beat.set()

    def wait_for_error(self, otherwise: str) -> ParallelError:
        """The team's error, once it is known."""
        self._failed.wait(NEWS)
        return ParallelError(self.error or otherwise)

    def expect_leaving(self) -> None:
        """From now on it is no failure if another rank leaves."""
        self._parting = True

    def stop(self) -> None:
        """Leave. Where that is a failure, the others end; where it is not, only their hearts."""
        atexit.unregister(self.stop)
        self._leaving = self._parting = True
        self._beat.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                state, message = self._exchange()
            except Exception as error:
                if not self._leaving:
                    self._fail(self._own or why_lost(error) or f"the ranks cannot reach each other: {error}")
                return
            if state == FAILED:
                self._fail(message)
                return
            if state == LEAVING:
                self._part()
                return
            self._beat.wait(INTERVAL)
            self._beat.clear()

    def _exchange(self) -> tuple[int, str]:
        """One beat: the worst state of a rank, and what the first that failed says."""
        own = self._own
        beats = torch.zeros(self._size, 1 + MESSAGE, dtype=torch.uint8)
        if own is not None:
            text = own.encode()[:MESSAGE]
            beats[self._rank, 0] = FAILED
            beats[self._rank, 1 : 1 + len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        elif self._leaving:
            beats[self._rank, 0] = LEAVING
        dist.all_reduce(beats, group=self._group)
        states = beats[:, 0].tolist()
        if FAILED not in states:
            return max(states), ""
        text = bytes(beats[states.index(FAILED), 1:].tolist()).rstrip(b"\0")
        return FAILED, text.decode(errors="replace")

    def _part(self) -> None:
        """Some rank has left. If this one is in the middle of something, that must be about to end."""
        deadline = time.monotonic() + NEWS
        while self._engaged and not self._parting and time.monotonic() < deadline:
            time.sleep(0.01)
        if self._parting:
            self.error = "a rank has ended"
        else:
            self._fail("a rank has ended" + (" in the middle of something that all do" if self._engaged else ""))

    def _fail(self, message: str) -> None:
        self.error = message
        self._failed.set()  # before the callbacks, which may wake who waits for it
        for callback in self._callbacks:
            callback()
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            if not self._engaged:
                return  # whoever comes next is told
            time.sleep(0.05)
        print(f"hf_paged: {message}; rank {self._rank} is stuck and ends", file=sys.stderr, flush=True)
        os._exit(1)


def why_lost(error: BaseException) -> str | None:
    """What an error of torch.distributed says of another rank; None if it is another kind of error."""
    if isinstance(error, RuntimeError):
        text = str(error)
        if any(sign in text for sign in ("Connection closed", "Connection reset", "Broken pipe")):
            return "a rank has died: its connection is closed"
        if "Timed out" in text or "timed out" in text:
            return f"a rank does not answer: {text.rpartition('] ')[2]}"
    return None
