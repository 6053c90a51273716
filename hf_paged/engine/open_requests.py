"""The requests of an engine that have not ended, how they end, and who is told."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from ..base.errors import DeadlineExceeded, QueueFull, RequestFailed
from ..base.types import RequestOutput
from ..core.request import Sequence
from ..core.scheduler import Scheduler
from ..runtime.media import MediaItem
from .request_state import RequestState


class OpenRequests:
    """Unfinished requests by id.

    Args:
        forget: called with the state of every request that has ended, before its callback.
    """

    def __init__(self, scheduler: Scheduler, forget: Callable[[RequestState], None]):
        self._scheduler = scheduler
        self._forget = forget
        self._states: dict[str, RequestState] = {}
        self._touched: dict[str, RequestState] = {}
        self._images: Counter[MediaItem] = Counter()  # how many requests hold each

    @property
    def has_news(self) -> bool:
        """Whether outputs have changed and nobody was told."""
        return bool(self._touched)

    def check_room(self, states: Iterable[RequestState], image_bytes: int | None) -> None:
        """Raise QueueFull if images would take more than so many bytes with those of `states`, unless there are no others."""
        new = {item for state in states for item in state.media.items.values()} - self._images.keys()
        if image_bytes is None or not new or not self._images:
            return
        held = sum(item.num_bytes for item in self._images)
        if held + sum(item.num_bytes for item in new) > image_bytes:
            raise QueueFull(f"images of other requests take {held} bytes already (queue_memory is {image_bytes})")

    def add(self, state: RequestState) -> None:
        self._states[state.request.request_id] = state
        self._images.update(state.media.items.values())

    def get(self, request_id: str) -> RequestState | None:
        return self._states.get(request_id)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._states

    def __iter__(self) -> Iterator[RequestState]:
        return iter(list(self._states.values()))

    def fail(self, sequence: Sequence, error: BaseException) -> None:
        """End the whole request of a sequence with an error of its own."""
        self.end_with(sequence.request.state, error)

    def end_with(self, state: RequestState, error: BaseException) -> None:
        """End a request with an error, as a RequestFailed whose cause it is."""
        request_id = state.request.request_id
        if not (isinstance(error, RequestFailed) and error.request_id == request_id):
            cause = error
            error = RequestFailed(request_id, f"{type(cause).__name__}: {cause}")
            error.__cause__ = cause
        self.end(state, "error", error)

    def end(self, state: RequestState, reason: str, error: Exception | None = None) -> None:
        if state.finished or self._states.get(state.request.request_id) is not state:
            return
        self._scheduler.abort(state.request.request_id)
        state.end(reason, error)
        self.touch(state)

    def expire(self) -> None:
        """End those whose deadline has passed."""
        for request in self._scheduler.expired(time.monotonic()):
            late = f"not finished {request.deadline - request.arrival:g} s after it came"
            self.end(request.state, "error", DeadlineExceeded(request.request_id, late))

    def touch(self, state: RequestState) -> None:
        """Its output has changed."""
        self._touched[state.request.request_id] = state

    def publish(self) -> list[RequestOutput]:
        """Close what finished, tell the callbacks, return the outputs that changed."""
        touched, self._touched = self._touched, {}
        for request_id, state in touched.items():
            state.settle()
            if state.finished:
                self._states.pop(request_id, None)
                self._images -= Counter(state.media.items.values())
                self._forget(state)
        for state in touched.values():
            if state.callback is not None:
                state.notify()
        return [state.output for state in touched.values()]
