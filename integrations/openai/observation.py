"""What is known of one HTTP request while it is served."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from ...base.sampling_params import SamplingParams
from ...base.types import RequestMetrics

_current: ContextVar[Observation | None] = ContextVar("hf_paged_observation", default=None)


def current() -> Observation | None:
    """The HTTP request that this coroutine works for."""
    return _current.get()


@contextlib.contextmanager
def observing(observation: Observation) -> Iterator[None]:
    """Make it the current one."""
    token = _current.set(observation)
    try:
        yield
    finally:
        _current.reset(token)


@dataclass(slots=True)
class Run:
    """What the engine did for one prompt of a request.

    Attributes:
        request_id: the engine's.
        adapter: the one it ran with; None: the model as it is.
        params: how it was sampled; None where nothing was.
        error: code of what ended it before its end; None: it came to its end.
    """

    request_id: str
    adapter: str | None
    params: SamplingParams | None
    prompt_tokens: int
    completion_tokens: int
    times: RequestMetrics
    finish_reasons: list[str]
    error: str | None


@dataclass(slots=True)
class Observation:
    """One HTTP request.

    Attributes:
        started, ended: on the clock of `time.monotonic`.
        route: the path as the app declares it; None where no route takes it.
        error: code of the error that it was answered with.
        timeout: what its header X-Request-Timeout says.
        key: digest of the API key that came with it.
    """

    request_id: str
    method: str
    path: str
    client: str | None
    timeout: str | None
    key: bytes | None
    headers: list[tuple[bytes, bytes]]
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None
    route: str | None = None
    status: int | None = None
    error: str | None = None
    runs: list[Run] = field(default_factory=list)

    @property
    def first_token(self) -> float | None:
        """Seconds until the first token of any prompt."""
        times = [run.times.first_token for run in self.runs if run.times.first_token is not None]
        return min(times) - self.started if times else None
