"""What all routes share: the engine, the tokenizer, names, and how a request's prompts run to their end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from functools import cached_property

from starlette.requests import Request
from starlette.types import Receive

from ...base.errors import InvalidArgument, QueueFull
from ...base.sampling_params import SamplingParams
from ...base.tasks import ClassifyParams, EmbedParams
from ...base.types import RequestDelta
from ...engine.async_engine import AsyncEngine, Together
from ...runtime.media import NO_MEDIA, Media
from .cutting import Cutter
from .drain import Drain
from .errors import Refused
from .images import Images, takes_images, with_images
from .metrics import Metrics
from .observation import current
from .parsing import Dialect
from .sampling import defaults_of
from .sandbox import Sandbox
from .settings import Settings

AGAIN = 0.05  # seconds after which a full queue is looked at again


class Service:
    """One model that is served.

    Args:
        engine: it must have a tokenizer.

    Attributes:
        tasks: what runs with no client waiting.
        images: what becomes of images; None if the model takes none.
    """

    def __init__(self, engine: AsyncEngine, settings: Settings):
        self.engine, self.settings = engine, settings
        self.tokenizer = engine.engine.tokenizer
        if self.tokenizer is None:
            raise InvalidArgument("engine: a server needs an engine with a tokenizer")
        if takes_images(engine.engine):
            self.tokenizer = with_images(self.tokenizer, engine.engine.processor)
        model = engine.engine.model
        config = model.module.config
        self.model_name = settings.model_name or getattr(config, "_name_or_path", "") or type(model.module).__name__
        self.max_model_len = engine.engine.max_model_len
        self.dialect = Dialect.of(self.tokenizer, settings.tool_parser, settings.reasoning_parser)
        self.defaults = defaults_of(getattr(model.module, "generation_config", None))
        self.metrics = Metrics(engine, self.model_name)
        self.drain = Drain(engine)
        self.started = int(time.time())
        self.tasks: set[asyncio.Task] = set()
        self.sandbox = Sandbox() if settings.request_chat_templates else None
        self.images = Images(engine.engine, settings) if takes_images(engine.engine) else None

    @cached_property
    def cutter(self) -> Cutter:
        return Cutter(self.tokenizer)

    @property
    def taking(self) -> bool:
        """Whether requests are taken."""
        return self.engine.running and not self.drain.draining

    async def close(self) -> None:
        """End what runs with no client waiting."""
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.images is not None:
            await self.images.reader.close()

    def adapter(self, name: str | None) -> str | None:
        """The adapter that a request's `model` names, for requests that may have one; None for the model as it is.

        Raises Refused for a name that is neither.
        """
        if name is None or name == self.model_name:
            return None
        if name not in self.engine.engine.adapters:
            message = f"model {name!r} is not here; there is {self.model_name!r}"
            raise Refused(message, param="model", status=404, code="model_not_found")
        return name

    def share(self, body) -> str | None:
        """Whose share of the engine a request is served from, under the policy "fair"; None: that of all who name nobody.

        With several API keys each key has one share, whatever its requests say. Else every `safety_identifier`, or
        `user`, has one. Names may be long, so the engine gets their digests.
        """
        if self.engine.engine.config.policy != "fair":
            return None
        observation = current()
        if len(self.settings.api_keys) > 1 and observation is not None and observation.key is not None:
            return observation.key.hex()
        name = getattr(body, "safety_identifier", None) or body.user
        return None if name is None else hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()

    def check_length(self, name: str, text: str) -> None:
        """Raise Refused for a text too long for any sequence, before time goes into cutting it into tokens."""
        most = self.max_model_len * self.settings.limits.characters_per_token
        if len(text) > most:
            message = f"{name}: {len(text)} characters are more than the {most} that could fit"
            raise Refused(message, param=name, code="context_length_exceeded")

    async def merged(self, jobs: list[Job]) -> AsyncIterator[tuple[int, RequestDelta]]:
        """What all jobs add, as it comes, with the place of each in the list. The first error ends them all."""
        if len(jobs) == 1:
            async with contextlib.aclosing(self._deltas(jobs[0])) as deltas:
                async for delta in deltas:
                    yield 0, delta
            return
        queue: asyncio.Queue = asyncio.Queue()
        engine = self.engine.engine.config
        at_once = min(len(jobs), 2 * engine.max_num_seqs, engine.max_queue or len(jobs))  # a long list leaves room to others
        turn, together = asyncio.Semaphore(at_once), Together(at_once)

        async def read(place: int) -> None:
            try:
                async with turn, contextlib.aclosing(self._deltas(jobs[place], together, place >= at_once)) as deltas:
                    async for delta in deltas:
                        queue.put_nowait((place, delta))
                queue.put_nowait((place, None))
            except Exception as error:
                queue.put_nowait((place, error))

        readers = [asyncio.create_task(read(place)) for place in range(len(jobs))]
        try:
            running = len(jobs)
            while running:
                place, news = await queue.get()
                if isinstance(news, Exception):
                    raise news
                if news is None:
                    running -= 1
                else:
                    yield place, news
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    async def finished(self, jobs: list[Job], usage: Usage) -> list[RequestDelta]:
        """All that each job gives, in their order; counted in `usage`."""
        wholes: dict[int, RequestDelta] = {}
        async for place, delta in self.merged(jobs):
            usage.add(place, delta)
            wholes[place] = wholes[place].then(delta) if place in wholes else delta
        return [wholes[place] for place in range(len(jobs))]

    def _deltas(self, job: Job, together: Together | None = None, later: bool = False) -> AsyncIterator[RequestDelta]:
        deltas = self._patient(job) if later else self._stream(job, together)
        sampling = job.params if isinstance(job.params, SamplingParams) else None
        return self.metrics.watched(deltas, sampling, job.adapter)

    def _stream(self, job: Job, together: Together | None = None) -> AsyncIterator[RequestDelta]:
        return self.engine.stream(
            job.prompt,
            job.params,
            request_id=job.request_id,
            priority=job.priority,
            user=job.user,
            cache_salt=job.cache_salt,
            adapter=job.adapter,
            deadline=seconds_left(self.settings.request_timeout),
            media=job.media,
            together=together,
        )

    async def _patient(self, job: Job) -> AsyncIterator[RequestDelta]:
        """`_stream` for a prompt whose request is under way already: a queue that is full now is waited for."""
        while True:
            try:
                async with contextlib.aclosing(self._stream(job)) as deltas:
                    async for delta in deltas:
                        yield delta
                return
            except QueueFull:
                await asyncio.sleep(AGAIN)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One prompt to run."""

    prompt: str | list[int]
    params: SamplingParams | EmbedParams | ClassifyParams
    request_id: str
    priority: int = 0
    user: str | None = None
    cache_salt: str | None = None
    adapter: str | None = None
    media: Media = NO_MEDIA  # of a prompt of token ids


def jobs_of(prompts: list, params, body, *, request_id: str, user: str | None, adapter: str | None) -> list[Job]:
    """One for each prompt of a request.

    Args:
        body: the request, which has a `priority` and a `cache_salt`.
        user: see `Service.share`.
        request_id: of the request; with several prompts the place of each is added.
    """
    return [
        Job(
            prompt=prompt,
            params=params,
            request_id=request_id if len(prompts) == 1 else f"{request_id}-{place}",
            priority=body.priority,
            user=user,
            cache_salt=body.cache_salt,
            adapter=adapter,
        )
        for place, prompt in enumerate(prompts)
    ]


def as_list(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One prompt or several, as text or token ids, as a list."""
    return [given] if isinstance(given, str) or given and isinstance(given[0], int) else given


@dataclass
class Usage:
    """Tokens of all jobs of a request, as far as they have come. `reasoning`: None where nobody looks for it."""

    prompt: dict[int, int] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    completion: int = 0
    reasoning: int | None = None

    def add(self, place: int, delta: RequestDelta) -> None:
        self.prompt[place] = len(delta.prompt_token_ids)
        self.cached[place] = delta.metrics.num_cached_tokens
        self.completion += sum(len(completion.token_ids) for completion in delta.outputs)

    def as_dict(self) -> dict:
        prompt = sum(self.prompt.values())
        reasoning = {} if self.reasoning is None else {"completion_tokens_details": {"reasoning_tokens": self.reasoning}}
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion,
            "total_tokens": prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
            **reasoning,
        }


def seconds_left(timeout: float | None) -> float | None:
    """Of the server's timeout or the request's own (its header X-Request-Timeout), whichever ends first; None: no limit.

    Raises Refused for a header that is no time, and when the time is over.
    """
    observation = current()
    if observation is None:
        return timeout
    limits = [] if timeout is None else [timeout]
    if observation.timeout is not None:
        try:
            limits.append(float(observation.timeout))
        except ValueError:
            limits.append(math.nan)
        if not 0 < limits[-1] < math.inf:
            message = "X-Request-Timeout must be a positive number of seconds"
            raise Refused(message, param="X-Request-Timeout", code="invalid_value")
    if not limits:
        return None
    left = observation.started + min(limits) - time.monotonic()
    if left <= 0:
        raise Refused(f"not begun {min(limits):g} s after it came", status=504, code="timeout")
    return left


def new_id(kind: str, separator: str = "-") -> str:
    return f"{kind}{separator}{uuid.uuid4().hex}"


async def first_of(deltas: AsyncIterator):
    """`deltas` again, after its first element has come: what is wrong with a request shows before it is answered."""
    try:
        first = await anext(deltas)
    except StopAsyncIteration:
        first = None

    async def chained():
        async with contextlib.aclosing(deltas):
            if first is not None:
                yield first
            async for delta in deltas:
                yield delta

    return chained()


@contextlib.asynccontextmanager
async def connected(receive: Receive) -> AsyncIterator[None]:
    """Scope that is cancelled, wherever it waits, when the client goes away; then raises Refused.

    Args:
        receive: the request's, whose body has been read.
    """
    task = asyncio.current_task()
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone and not task.uncancel():
            raise Refused("the client went away", status=499, code="client_closed_request") from None
        raise
    finally:
        watcher.cancel()


async def while_connected(request: Request, work: Coroutine):
    """The result of `work`, which is cancelled if the client goes away."""
    async with connected(request.receive):
        return await work
