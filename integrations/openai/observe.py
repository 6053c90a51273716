"""The outermost layer: every request gets an id, a line in the log, its counts, its trace."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .auth import key_of
from .errors import answer
from .metrics import Metrics
from .observation import Observation, observing

if TYPE_CHECKING:
    from .tracing import Tracing

log = logging.getLogger("hf_paged.server")
access = logging.getLogger("hf_paged.access")

_SANE = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")  # an id that can stand in headers and logs
_LONGEST_PATH = 200  # characters of a path that are logged
_MOST_IDS = 16  # of the prompts of one request


class Observe:
    """Gives every request an id, tells of it when it has ended, and answers the errors that nobody else did.

    The id is the client's X-Request-Id if that is short and plain, else a new one; it is in the answer's headers.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, model_name: str, log_client: bool, tracing: Tracing | None):
        self._app, self._metrics, self._model_name = app, metrics, model_name
        self._log_client, self._tracing = log_client, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        observation = self._begun(scope)
        self._metrics.begun()
        header = (b"x-request-id", observation.request_id.encode())

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                observation.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        try:
            with observing(observation):
                await self._answered(observation, scope, receive, noted)
        finally:
            observation.ended = time.monotonic()
            observation.route = getattr(scope.get("route"), "path", None)
            self._ended(observation)

    def _begun(self, scope: Scope) -> Observation:
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        timeout = headers.get(b"x-request-timeout")
        return Observation(
            request_id=given if _SANE.fullmatch(given) else uuid.uuid4().hex,
            method=scope["method"],
            path=scope["path"],
            client=scope["client"][0] if scope.get("client") else None,
            timeout=None if timeout is None else timeout.decode("latin-1"),
            key=key_of(scope),
            headers=scope["headers"],
        )

    async def _answered(self, observation: Observation, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except Exception as error:
            response = answer(error)
            if observation.status is not None:  # too late for another answer: the connection has to end
                raise
            await response(scope, receive, send)

    def _ended(self, observation: Observation) -> None:
        self._metrics.answered(observation)
        if self._tracing is not None:
            self._tracing.record(observation)
        if access.isEnabledFor(logging.INFO):
            access.info("request", extra={"fields": self._fields(observation)})

    def _fields(self, observation: Observation) -> dict:
        fields = {
            "request_id": observation.request_id,
            "method": observation.method,
            "path": observation.path[:_LONGEST_PATH],
            "status": observation.status,
            "duration_s": round(observation.ended - observation.started, 6),
        }
        if self._log_client:
            fields["client"] = observation.client
        if observation.runs:
            first = observation.first_token
            fields |= {
                "model": observation.runs[0].adapter or self._model_name,
                "ttft_s": None if first is None else round(first, 6),
                "prompt_tokens": sum(run.prompt_tokens for run in observation.runs),
                "cached_tokens": sum(run.times.num_cached_tokens for run in observation.runs),
                "completion_tokens": sum(run.completion_tokens for run in observation.runs),
                "ids": [run.request_id for run in observation.runs[:_MOST_IDS]],
            }
        if observation.error is not None:
            fields["error"] = observation.error
        return fields
