"""From the engine's thread to the coroutines that read its requests."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading
from collections import deque

from ..base.types import CompletionDelta, CompletionOutput, RequestDelta, RequestOutput


class Readers:
    """Wakes the readers of an engine: all that a step has news for with one call into each event loop.

    Args:
        thread: the engine's, which calls `wake` after every step. What other threads bring is told at once.
    """

    def __init__(self, thread: threading.Thread):
        self._thread = thread
        self._changed: dict[asyncio.AbstractEventLoop, list[Reader]] = {}

    def tell(self, reader: Reader) -> None:
        """There is news for `reader`."""
        if threading.current_thread() is self._thread:
            self._changed.setdefault(reader.loop, []).append(reader)
        else:
            _call(reader.loop, [reader])

    def wake(self) -> None:
        changed, self._changed = self._changed, {}
        for loop, readers in changed.items():
            _call(loop, readers)


def _call(loop: asyncio.AbstractEventLoop, readers: list[Reader]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
        loop.call_soon_threadsafe(_set_all, readers)


def _set_all(readers: list[Reader]) -> None:
    for reader in readers:
        reader.changed.set()


class Reader:
    """Hands one request's news to a coroutine of one event loop.

    Attributes:
        changed: set in the loop when there is news.
        finished: whether the request has ended, or never began.
        gone: whether nobody reads any more.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, readers: Readers):
        self.loop = loop
        self.changed = asyncio.Event()
        self.finished = self.gone = False
        self._failure: Exception | None = None
        self._readers = readers

    def put(self, output: RequestOutput) -> None:
        """The request's output has changed. Called by whichever thread runs the engine."""
        self._note(output)
        self.finished = self.finished or output.finished
        self._readers.tell(self)

    def fail(self, error: Exception) -> None:
        """The request cannot begin."""
        self._failure, self.finished = error, True
        self._readers.tell(self)

    async def get(self):
        """All news since the last call; waits until there is some. Raises what `fail` was given."""
        while True:
            await self.changed.wait()
            self.changed.clear()
            if self._failure is not None:
                raise self._failure
            news = self._taken()
            if news is not None:  # else an earlier call had what this was told of
                return news

    def _note(self, output: RequestOutput) -> None:
        raise NotImplementedError

    def _taken(self) -> RequestOutput | RequestDelta | None:
        raise NotImplementedError


class OutputReader(Reader):
    """The newest output as a whole."""

    def __init__(self, loop, readers):
        super().__init__(loop, readers)
        self._latest: deque[RequestOutput] = deque(maxlen=1)  # one thread fills it, another empties it

    def _note(self, output):
        self._latest.append(_snapshot(output))

    def _taken(self):
        return self._latest.pop() if self._latest else None


def _snapshot(output: RequestOutput) -> RequestOutput:
    """A copy that later steps do not change. Token and log-probability entries themselves never change."""
    result = copy.copy(output)
    result.outputs = [copy.copy(completion) for completion in output.outputs]
    for completion in result.outputs:
        completion.token_ids = list(completion.token_ids)
        if completion.logprobs is not None:
            completion.logprobs = list(completion.logprobs)
    if result.prompt_logprobs is not None:
        result.prompt_logprobs = list(result.prompt_logprobs)
    result.metrics = copy.copy(output.metrics)
    return result


class DeltaReader(Reader):
    """What was added since the last look."""

    def __init__(self, loop, readers):
        super().__init__(loop, readers)
        self._seen: dict[int, tuple[int, int]] = {}  # completion -> (characters, tokens) noted
        self._waiting: deque[RequestDelta] = deque()  # appended by one thread, emptied by another

    def _note(self, output):
        added = [self._added(completion) for completion in output.outputs]
        self._waiting.append(
            RequestDelta(
                request_id=output.request_id,
                prompt_token_ids=output.prompt_token_ids,
                outputs=[delta for delta in added if delta is not None],
                metrics=copy.copy(output.metrics),
                finished=output.finished,
                prompt_logprobs=list(output.prompt_logprobs) if output.finished and output.prompt_logprobs else None,
                error=output.error,
            )
        )

    def _added(self, completion: CompletionOutput) -> CompletionDelta | None:
        """None for a completion that ended before, or has nothing new."""
        characters, tokens = self._seen.get(completion.index, (0, 0))
        if characters < 0:
            return None
        ended = completion.finished
        delta = CompletionDelta(
            index=completion.index,
            text=completion.text[characters:],
            token_ids=completion.token_ids[tokens:],
            logprobs=None if completion.logprobs is None else completion.logprobs[tokens:],
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )
        self._seen[completion.index] = (-1, -1) if ended else (len(completion.text), len(completion.token_ids))
        return delta if ended or delta.token_ids or delta.text else None

    def _taken(self):
        news = None
        while self._waiting:
            added = self._waiting.popleft()
            news = added if news is None else news.then(added)
        return news
