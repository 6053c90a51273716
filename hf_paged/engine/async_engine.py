"""asyncio over an engine: one thread steps, every request is an async iterator of what it brings."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

from ..base.branch import Branch
from ..base.errors import EngineClosed, ParallelError
from ..base.sampling_params import SamplingParams
from ..base.tasks import ClassificationOutput, ClassifyParams, EmbeddingOutput, EmbedParams, ScoreOutput
from ..base.types import AdapterInfo, RequestDelta, RequestOutput
from ..runtime.kv_state import KVState
from .engine import BatchEngine, Prompt
from .job import Work, as_list, grouped, own_images, result_of
from .lock import FairLock
from .readers import DeltaReader, OutputReader, Reader, Readers
from .request_state import RequestState

FUNCTIONS = ("logits_processors", "stopping_criteria", "forward_hooks")
QUICK = 1024  # characters or tokens of a prompt

Arrivals = list[tuple[RequestState, Reader]]  # taken all or none


class Together:
    """`size` requests, of one event loop, that the queue takes all or none; each waits until the others have come.

    Whoever stops reading one of them before must stop reading the others, too.
    """

    def __init__(self, size: int):
        self._size = size
        self.arrivals: Arrivals = []

    def add(self, state: RequestState, reader: Reader) -> bool:
        """Whether it was the last."""
        self.arrivals.append((state, reader))
        return len(self.arrivals) == self._size


class AsyncEngine:
    """Serves many coroutines from one engine.

        engine = hf_paged.AsyncEngine(hf_paged.Engine(model, tokenizer))
        async for delta in engine.stream("Hello", SamplingParams(max_tokens=50)):
            print(delta.outputs[0].text, end="")

    A coroutine that is cancelled, or stops iterating, aborts its request within one step. The thread waits while there
    is nothing to do, or the engine sleeps. Any number of event loops may use it; a step wakes each of them once.

    Args:
        engine: the engine to run; `close` closes it too.
    """

    def __init__(self, engine: BatchEngine):
        self.engine = engine
        self._work = threading.Event()
        self._arrivals: deque[Arrivals] = deque()  # prepared, for the thread to admit
        self._gate = FairLock()  # held while a step runs, so that none comes between falling asleep and waking up
        self._closing = self._ended = False
        self._thread = threading.Thread(target=self._run, name="hf_paged-engine", daemon=True)
        self._readers = Readers(self._thread)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._loop()
        finally:
            self._ended = True
            self._refuse_arrivals()

    def _loop(self) -> None:
        while True:
            self._work.wait()
            if self._closing:
                return
            self._admit_arrivals()
            if not self._has_work():
                self._work.clear()
                if not self._arrivals and not self._has_work() and not self._closing:
                    continue
                self._work.set()  # something came between the two looks
                continue
            try:
                with self._gate:
                    if not self.engine.sleeping:
                        self.engine.step()
            except EngineClosed:
                return
            except ParallelError:  # the engine has told all its requests; there can be no others
                return
            except Exception as error:  # not one request's fault: tell every waiter, and go on with what comes
                self.engine.fail_all(error)
            except BaseException as error:  # a user's callable asked the thread to exit
                self.engine.fail_all(error)
                return
            finally:
                self._readers.wake()

    @property
    def running(self) -> bool:
        """Whether requests are taken: not after `close`, nor if the thread has ended."""
        return not (self._ended or self._closing)

    def _has_work(self) -> bool:
        return self.engine.has_unfinished() and not self.engine.sleeping

    def _admit_arrivals(self) -> None:
        """All that have come since the last step, at once: each by itself would wait for a step of its own."""
        while self._arrivals:
            arrivals = self._arrivals.popleft()
            if any(reader.gone for _, reader in arrivals):
                continue
            try:
                self.engine.admit(*(state for state, _ in arrivals))
            except Exception as error:
                for _, reader in arrivals:
                    reader.fail(error)
        self._readers.wake()

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None, **options
    ) -> AsyncIterator[RequestDelta]:
        """Yield what each step added to the request. A slow reader gets what several steps added at once; nothing is lost.

        `options` are those of `Engine.add`, such as `priority`, `deadline` (seconds) and `cache_salt`; and `together`, for
        requests that the queue takes all or none.

        Raises:
            InvalidArgument, RequestTooLarge, QueueFull: at the first iteration, as `Engine.add`.
            RequestFailed, DeadlineExceeded, EngineClosed: the request's own end.
        """
        return self._read(DeltaReader, prompt, params, request_id, options)

    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None, **options
    ) -> AsyncIterator[RequestOutput]:
        """Yield the request's whole output after every step that changed it; each is a snapshot of its own.

        A slow reader skips intermediate outputs and never the last one. Options and errors are those of `stream`.
        """
        return self._read(OutputReader, prompt, params, request_id, options)

    async def _read(self, kind: type[Reader], prompt: Prompt, params, request_id: str | None, options: dict):
        loop = asyncio.get_running_loop()
        reader = kind(loop, self._readers)
        together: Together | None = options.pop("together", None)
        functions = {name: options.pop(name) for name in FUNCTIONS if name in options}
        options |= {"hooks": self.engine.hooks(**functions), "on_output": reader.put}
        prepare = partial(self.engine.prepare, prompt, params, request_id=request_id, **options)
        quick = options.get("images") is None and _is_quick(prompt, params)
        state = prepare() if quick else await loop.run_in_executor(None, prepare)
        state.streamed = kind is DeltaReader
        if together is None:
            self._arrivals.append([(state, reader)])
        elif together.add(state, reader):
            self._arrivals.append(together.arrivals)
        self._work.set()
        if self._ended:
            self._refuse_arrivals()
        try:
            while True:
                news = await reader.get()
                if news.error is not None:
                    raise news.error
                yield news
                if news.finished:
                    return
        finally:
            if not reader.finished:
                reader.gone = True
                self.engine.abandon(state)
                self._work.set()

    def _refuse_arrivals(self) -> None:
        """There is no thread any more to admit them."""
        with contextlib.suppress(IndexError):  # another thread may be at it, too
            while True:
                for _, reader in self._arrivals.popleft():
                    reader.fail(EngineClosed("the engine's thread has ended"))
        self._readers.wake()

    async def complete(self, prompt: Prompt, params: SamplingParams | None = None, **options) -> RequestOutput:
        """The request's last output."""
        async with contextlib.aclosing(self.generate(prompt, params, **options)) as outputs:
            async for output in outputs:
                last = output
        return last

    async def embed(
        self, prompts, pooling: str | None = None, normalize: bool = True, dimensions: int | None = None, **options
    ) -> list[EmbeddingOutput]:
        """See `Engine.embed`. `options` are those of `Engine.add`, for every prompt, but for `request_id`.

        Of a long list so many run or wait in the engine at a time that others still get their turn.

        Raises the first error of a prompt, as `stream`; the other prompts are then aborted.
        """
        params = EmbedParams(pooling=pooling, normalize=normalize, dimensions=dimensions)
        own = own_images(prompts, options.pop("images", None))
        return await self._results([(prompt, params, more) for prompt, more in zip(as_list(prompts), own)], options)

    async def score(self, prompts, continuations, **options) -> list[ScoreOutput] | list[list[ScoreOutput]]:
        """See `Engine.score`; options and errors are those of `embed`."""
        loop = asyncio.get_running_loop()
        images = options.pop("images", None)
        work, counts = await loop.run_in_executor(None, self.engine.scoring, prompts, continuations, images)
        return grouped(await self._results(work, options), counts)

    async def classify(self, prompts, activation: str | None = None, **options) -> list[ClassificationOutput]:
        """See `Engine.classify`; options and errors are those of `embed`."""
        params = ClassifyParams(activation=activation)
        own = own_images(prompts, options.pop("images", None), pairs=True)
        work = [(prompt, params, more) for prompt, more in zip(as_list(prompts, pairs=True), own)]
        return await self._results(work, options)

    async def _results(self, work: Work, options: dict) -> list:
        config = self.engine.config
        turn = asyncio.Semaphore(min(config.max_num_seqs, config.max_queue or config.max_num_seqs))

        async def result(prompt, params, own):
            async with turn:
                return result_of(await self.complete(prompt, params, **own, **options))

        running = [asyncio.ensure_future(result(*one)) for one in work]
        try:
            return await asyncio.gather(*running)
        finally:
            for one in running:
                one.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def abort(self, request_id: str) -> bool:
        """End a request by its id; its iterator yields a last output with finish reason "abort"."""
        return await asyncio.to_thread(self.engine.abort, request_id)

    async def fork(self, request: str | RequestOutput, position: int | None = None, *, index: int = 0) -> Branch:
        """See `BatchEngine.fork`. The Branch is a prompt for `stream`, `generate` and `complete`."""
        return await asyncio.to_thread(partial(self.engine.fork, request, position, index=index))

    async def roll_back(
        self, request_id: str, position: int, params: SamplingParams | None = None, *, index: int = 0
    ) -> None:
        """See `BatchEngine.roll_back`. For requests that are read with `generate` or `complete`."""
        await asyncio.to_thread(partial(self.engine.roll_back, request_id, position, params, index=index))
        self._work.set()

    async def save_kv(self, prompt: Prompt | RequestOutput, **options) -> KVState:
        """See `BatchEngine.save_kv`."""
        state = await asyncio.to_thread(partial(self.engine.save_kv, prompt, **options))
        self._work.set()
        return state

    async def load_kv(self, state: KVState | str | Path, *, cache_salt: str | bytes | None = None) -> str:
        """See `BatchEngine.load_kv`."""
        return await asyncio.to_thread(partial(self.engine.load_kv, state, cache_salt=cache_salt))

    async def drop_kv(self, name: str) -> None:
        """See `BatchEngine.drop_kv`."""
        await asyncio.to_thread(self.engine.drop_kv, name)

    async def load_adapter(self, name: str, source, **options) -> AdapterInfo:
        """See `BatchEngine.load_adapter`."""
        return await asyncio.to_thread(partial(self.engine.load_adapter, name, source, **options))

    async def unload_adapter(self, name: str) -> None:
        """See `BatchEngine.unload_adapter`."""
        await asyncio.to_thread(self.engine.unload_adapter, name)

    async def resize_kv_cache(self, memory: int | str) -> None:
        """See `BatchEngine.resize_kv_cache`."""
        await asyncio.to_thread(self.engine.resize_kv_cache, memory)

    async def sleep(self) -> None:
        """See `BatchEngine.sleep`. Requests that run or come wait until `wake_up`, and so do their deadlines."""
        await asyncio.to_thread(self._sleep)

    def _sleep(self) -> None:
        with self._gate:
            self.engine.sleep()

    async def wake_up(self) -> None:
        """See `BatchEngine.wake_up`. If the memory is not there, the engine goes on sleeping."""
        await asyncio.to_thread(self.engine.wake_up)
        self._work.set()

    async def close(self) -> None:
        """Stop the thread, end every request with EngineClosed, and close the engine."""
        await asyncio.to_thread(self._shut)

    def _shut(self) -> None:
        self._closing = True
        self._work.set()
        self._thread.join()
        self.engine.close()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc_info):
        await self.close()


def _is_quick(prompt: Prompt, params: SamplingParams | None) -> bool:
    """Whether a request is prepared sooner than another thread would begin with it: no grammar, template, long text."""
    if isinstance(params, SamplingParams) and (params.structured_outputs is not None or params.bad_words):
        return False
    if isinstance(prompt, list):
        return len(prompt) <= QUICK and not (prompt and isinstance(prompt[0], dict))
    return isinstance(prompt, str) and len(prompt) <= QUICK
