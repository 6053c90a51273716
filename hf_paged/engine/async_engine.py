"""asyncio over an engine: one thread steps, every request is an async iterator of its outputs."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading
from collections.abc import AsyncIterator
from functools import partial

from ..base.errors import EngineClosed
from ..base.sampling_params import SamplingParams
from ..base.types import RequestOutput
from .engine import BatchEngine, Prompt
from .lock import FairLock
from .request_state import new_request_id


class AsyncEngine:
    """Serves many coroutines from one engine.

        engine = hf_paged.AsyncEngine(hf_paged.Engine(model, tokenizer))
        async for output in engine.generate("Hello", SamplingParams(max_tokens=50)):
            print(output.outputs[0].text)

    A coroutine that is cancelled, or stops iterating, aborts its request within one step. The thread waits while there
    is nothing to do, or the engine sleeps. Any number of event loops may use it.

    Args:
        engine: the engine to run; `close` closes it too.
    """

    def __init__(self, engine: BatchEngine):
        self.engine = engine
        self._work = threading.Event()
        self._gate = FairLock()  # held while a step runs, so that none comes between falling asleep and waking up
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="hf_paged-engine", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        while True:
            self._work.wait()
            if self._closing:
                return
            if not self._has_work():
                self._work.clear()
                if not self._has_work() and not self._closing:  # else something came between the two looks
                    continue
                self._work.set()
                continue
            try:
                with self._gate:
                    if not self.engine.sleeping:
                        self.engine.step()
            except EngineClosed:
                return
            except Exception as error:  # not one request's fault: tell every waiter, and go on with what comes
                self.engine.fail_all(error)
            except BaseException as error:  # a user's callable asked the thread to exit
                self.engine.fail_all(error)
                return

    def _has_work(self) -> bool:
        return self.engine.has_unfinished() and not self.engine.sleeping

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None, **options
    ) -> AsyncIterator[RequestOutput]:
        """Yield the request's output after every step that changed it; each is a snapshot of its own.

        A slow reader skips intermediate outputs and never the last one. `options` are those of `Engine.add`, such as
        `priority`, `deadline` (seconds) and `cache_salt`.

        Raises:
            InvalidArgument, RequestTooLarge, QueueFull: at the first iteration, as `Engine.add`.
            RequestFailed, DeadlineExceeded, EngineClosed: the request's own end.
        """
        if not self._thread.is_alive():
            raise EngineClosed("the engine's thread has ended")
        loop = asyncio.get_running_loop()
        latest = _Latest(loop)
        name = new_request_id() if request_id is None else request_id
        add = partial(self.engine.add, prompt, params, request_id=name, on_output=latest.put, **options)
        added = loop.run_in_executor(None, add)  # it may wait for the running step; the event loop may not
        try:
            await asyncio.shield(added)
            self._work.set()
            while True:
                output = await latest.get()
                if output.error is not None:
                    raise output.error
                yield output
                if output.finished:
                    return
        finally:
            if not latest.finished:
                added.add_done_callback(partial(self._abort_added, name))

    def _abort_added(self, request_id: str, added: asyncio.Future) -> None:
        """Nobody reads this request any more. It may have been cancelled while it was still being added."""
        if not added.cancelled() and added.exception() is None:
            threading.Thread(target=self.engine.abort, args=(request_id,), daemon=True).start()

    async def complete(self, prompt: Prompt, params: SamplingParams | None = None, **options) -> RequestOutput:
        """The request's last output."""
        async with contextlib.aclosing(self.generate(prompt, params, **options)) as outputs:
            async for output in outputs:
                last = output
        return last

    async def abort(self, request_id: str) -> bool:
        """End a request by its id; its iterator yields a last output with finish reason "abort"."""
        return await asyncio.to_thread(self.engine.abort, request_id)

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


class _Latest:
    """The newest output of one request, handed from the engine's thread to the request's event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._changed = asyncio.Event()
        self._output: RequestOutput | None = None
        self.finished = False

    def put(self, output: RequestOutput) -> None:
        self.finished = self.finished or output.finished
        snapshot = _snapshot(output)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._set, snapshot)

    def _set(self, output: RequestOutput) -> None:
        self._output = output
        self._changed.set()

    async def get(self) -> RequestOutput:
        await self._changed.wait()
        self._changed.clear()
        return self._output


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
