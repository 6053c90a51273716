"""From the engine's thread to the coroutines that read its requests."""

from __future__ import annotations

import asyncio
import contextlib
import threading

from ..base.types import CompletionDelta, CompletionOutput, Logprob, RequestDelta, RequestOutput


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

    The engine's thread only marks how far the output has come; what lies between two marks is cut out of the live output
    by whoever reads, and so nothing piles up for a slow reader. (What an output says up to a mark never changes: texts and
    lists only grow.)

    Attributes:
        changed: set in the loop when there is news.
        finished: whether the request has ended, or never began.
        gone: whether nobody reads any more.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, readers: Readers):
        self.loop = loop
        self.changed = asyncio.Event()
        self.finished = self.gone = False
        self._latest: Marks | None = None  # replaced as a whole: one thread writes it, another reads it
        self._read: Marks | None = None
        self._failure: Exception | None = None
        self._readers = readers

    def put(self, output: RequestOutput) -> None:
        """The request's output has changed. Called by whichever thread runs the engine."""
        self._latest = Marks(output)
        self.finished = self.finished or output.finished
        self._readers.tell(self)

    def fail(self, error: Exception) -> None:
        """The request cannot begin."""
        self._failure, self.finished = error, True
        self._readers.tell(self)

    async def get(self) -> RequestOutput | RequestDelta:
        """All news since the last call; waits until there is some. Raises what `fail` was given."""
        while True:
            await self.changed.wait()
            self.changed.clear()
            if self._failure is not None:
                raise self._failure
            latest = self._latest
            if latest is not self._read:  # else an earlier call had what this was told of
                self._read = latest
                return self._news(latest)

    def _news(self, marks: Marks) -> RequestOutput | RequestDelta:
        raise NotImplementedError


class Marks:
    """How far a request had come at one moment.

    Attributes:
        completions: (completion, characters, tokens, cumulative log-probability, finish reason, stop reason) of each.
    """

    __slots__ = ("output", "completions", "finished", "error")

    def __init__(self, output: RequestOutput):
        self.output, self.finished, self.error = output, output.finished, output.error
        self.completions = [
            (one, len(one.text), len(one.token_ids), one.cumulative_logprob, one.finish_reason, one.stop_reason)
            for one in output.outputs
        ]

    @property
    def prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        entries = self.output.prompt_logprobs
        return None if entries is None else list(entries)


class OutputReader(Reader):
    """The newest output as a whole."""

    def _news(self, marks):
        output = marks.output
        snapshot = RequestOutput(
            request_id=output.request_id,
            prompt=output.prompt,
            prompt_token_ids=output.prompt_token_ids,
            outputs=[
                CompletionOutput(
                    index=one.index,
                    text=one.text[:characters],
                    token_ids=one.token_ids[:tokens],
                    logprobs=None if one.logprobs is None else one.logprobs[:tokens],
                    cumulative_logprob=cumulative,
                    finish_reason=finish_reason,
                    stop_reason=stop_reason,
                )
                for one, characters, tokens, cumulative, finish_reason, stop_reason in marks.completions
            ],
            metrics=output.metrics.copy(),
            finished=marks.finished,
            prompt_logprobs=marks.prompt_logprobs,
            result=output.result,
            error=marks.error,
        )
        snapshot.origin = output.origin
        return snapshot


class DeltaReader(Reader):
    """What was added since the last look."""

    def __init__(self, loop, readers):
        super().__init__(loop, readers)
        self._seen: dict[int, tuple[int, int]] = {}  # completion -> (characters, tokens) told; negative: its end

    def _news(self, marks):
        output = marks.output
        added = [self._added(*mark) for mark in marks.completions]
        return RequestDelta(
            request_id=output.request_id,
            prompt_token_ids=output.prompt_token_ids,
            outputs=[delta for delta in added if delta is not None],
            metrics=output.metrics.copy(),
            finished=marks.finished,
            prompt_logprobs=(marks.prompt_logprobs or None) if marks.finished else None,
            result=output.result if marks.finished else None,
            error=marks.error,
        )

    def _added(
        self, one: CompletionOutput, characters: int, tokens: int, _, finish_reason: str | None, stop_reason: int | str | None
    ) -> CompletionDelta | None:
        """None for a completion that ended before, or has nothing new."""
        first_character, first_token = self._seen.get(one.index, (0, 0))
        if first_character < 0:
            return None
        if finish_reason is None and (characters, tokens) == (first_character, first_token):
            return None
        self._seen[one.index] = (characters, tokens) if finish_reason is None else (-1, -1)
        return CompletionDelta(
            index=one.index,
            text=one.text[first_character:characters],
            token_ids=one.token_ids[first_token:tokens],
            logprobs=None if one.logprobs is None else one.logprobs[first_token:tokens],
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )
