"""What takes the requests: it reads each, chooses what the replica is chosen by, and passes the answer on."""

from __future__ import annotations

import asyncio
import json
import re

from fastapi.sse import format_sse_event
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..openai.auth import OPEN, RequireKey, path_of
from ..openai.errors import Refused, answer, body_of
from ..openai.middleware import LimitBody
from ..openai.settings import Settings
from .exchange import Call, plain
from .merged import CONTENT_TYPE, merged
from .prefix import prefix_keys

LONG = 256 * 1024  # bytes of a body that is read in another thread
RESPONSES = "/v1/responses"
CHECK_SECONDS = 5.0  # in which a replica must have said how it is
_KEPT = re.compile(r"resp_(\w+)[0-9a-f]{32}")
_NUMBER = re.compile(rb'"sequence_number": ?(\d+)')


class Front:
    """The deployment that is asked over HTTP.

    Args:
        replicas: handle of the deployment of engines.
        settings: what all replicas have.
        may_be_none: whether it is well to have no replica, since a request starts one.
    """

    def __init__(self, replicas: DeploymentHandle, settings: Settings, may_be_none: bool):
        self._replicas, self._settings, self._may_be_none = replicas, settings, may_be_none

    def __serve_build_asgi_app__(self) -> ASGIApp:
        settings = self._settings
        app: ASGIApp = LimitBody(
            _Passing(self._replicas, settings, self._may_be_none), settings.limits.body_bytes, settings.body_timeout
        )
        if settings.api_keys:  # here, too: nobody else's body is worth reading
            app = RequireKey(app, settings.api_keys, settings.page)
        return _OwnId(app)


class _OwnId:
    """Takes X-Request-Id off answers: Ray's proxy, which has given the request its id, puts it there itself."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def without(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"x-request-id"]
                message = message | {"headers": headers}
            await send(message)

        await self._app(scope, receive, without if scope["type"] == "http" else send)


class _Passing:
    def __init__(self, replicas: DeploymentHandle, settings: Settings, may_be_none: bool):
        self._replicas, self._settings, self._may_be_none = replicas, settings, may_be_none
        self._answers = replicas.options(method_name="answer", stream=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await _live(receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1003})
        path = path_of(scope)
        if path in OPEN:
            await (await self._health())(scope, receive, send)
        elif path == "/metrics" and scope["method"] == "GET":
            await (await self._metrics())(scope, receive, send)
        else:
            await self._pass(path, scope, receive, send)

    async def _health(self) -> Response:
        """Whether there is a replica that takes requests; asked past the queues, which may be full."""
        told = await self._replicas.broadcast("taking").results_async(timeout_s=CHECK_SECONDS, return_exceptions=True)
        if True in told or (not told and self._may_be_none):
            return JSONResponse({"status": "ok"})
        return answer(Refused("no replica takes requests", status=503, code="unavailable"))

    async def _metrics(self) -> Response:
        told = await self._replicas.broadcast("numbers").results_async(timeout_s=CHECK_SECONDS, return_exceptions=True)
        pages = dict(page for page in told if not isinstance(page, Exception))
        return Response(await asyncio.to_thread(merged, pages), media_type=CONTENT_TYPE)

    async def _pass(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _whole(receive)
        if body is None:  # the client has gone
            return
        try:
            timeout = _timeout(scope, self._settings.request_timeout)
        except Refused as error:
            return await answer(error)(scope, receive, send)
        prefix, replica = await _wanted(path, body)
        sent = _Sent(path, send)
        answers = self._answers.remote(Call(plain(scope), body, prefix, replica))
        try:
            async with asyncio.timeout(timeout) as limit:
                async for messages in answers:
                    limit.reschedule(None)  # from now on the replica's own deadline counts
                    for message in messages:
                        await sent(message)
        except Exception as error:
            await sent.fail(_described(error), scope, receive)
        finally:
            if not sent.whole:
                answers.cancel()


class _Sent:
    """What of an answer has been sent, so that an error can still be told in its form."""

    def __init__(self, path: str, send: Send):
        self._path, self._send = path, send
        self._begun = self._streams = False
        self._number = -1  # of the last event of a response
        self.whole = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun = True
            self._streams = any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in message["headers"]
            )
        elif message["type"] == "http.response.body":
            self.whole = not message.get("more_body", False)
            if self._streams and self._path.startswith(RESPONSES):
                numbers = _NUMBER.findall(message.get("body", b""))
                self._number = int(numbers[-1]) if numbers else self._number
        await self._send(message)

    async def fail(self, error: Refused, scope: Scope, receive: Receive) -> None:
        """Nothing more will come of the answer."""
        if self.whole:
            return
        if not self._begun:
            await answer(error)(scope, receive, self._send)
        elif self._streams:
            await self._send({"type": "http.response.body", "body": self._event(error), "more_body": False})
        else:  # too late for another answer: the connection has to end
            raise error
        self.whole = True

    def _event(self, error: Refused) -> bytes:
        told = body_of(error)
        if not self._path.startswith(RESPONSES):
            return format_sse_event(data_str=json.dumps(told))
        fields = {name: told["error"][name] for name in ("code", "message", "param")}
        event = {"type": "error", "sequence_number": self._number + 1, **fields}
        return format_sse_event(event="error", data_str=json.dumps(event))


def _described(error: Exception) -> Refused:
    if isinstance(error, BackPressureError):
        return Refused("too many requests wait already; try again later", status=429, code="queue_full")
    if isinstance(error, DeploymentUnavailableError):
        return Refused("there are no replicas", status=503, code="unavailable")
    if isinstance(error, RayActorError):
        return Refused("the replica that had this request has ended", status=503, code="replica_lost")
    if isinstance(error, TimeoutError):
        return Refused("the request took too long", status=504, code="timeout")
    unknown = Refused("the server failed at this request", status=500, code="internal_error")
    unknown.__cause__ = error
    return unknown


async def _whole(receive: Receive) -> bytes | None:
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _timeout(scope: Scope, limit: float | None) -> float | None:
    """Seconds in which an answer must begin: a request must not wait for a replica for longer than it may take as a whole.

    What is no time is for the replica to refuse.
    """
    asked = dict(scope["headers"]).get(b"x-request-timeout", b"").decode("latin-1")
    try:
        seconds = float(asked)
    except ValueError:
        return limit
    return min(seconds, limit or seconds) if 0 < seconds < float("inf") else limit


async def _wanted(path: str, body: bytes) -> tuple[tuple[bytes, ...], str | None]:
    """What a request's replica is chosen by: keys of its prompt's beginning, and the replica that holds what it asks for."""
    if path.startswith(RESPONSES + "/"):
        return (), _holder(path[len(RESPONSES) + 1 :].partition("/")[0])
    if not body:
        return (), None
    return await asyncio.to_thread(_read, path, body) if len(body) > LONG else _read(path, body)


def _read(path: str, body: bytes) -> tuple[tuple[bytes, ...], str | None]:
    try:
        given = json.loads(body)
        keys = prefix_keys(path, given)
    except (ValueError, RecursionError):  # the replica refuses it
        return (), None
    before = given.get("previous_response_id") if path == RESPONSES and isinstance(given, dict) else None
    return keys, _holder(before) if isinstance(before, str) else None


def _holder(response: str) -> str | None:
    """The replica that a response's id names."""
    found = _KEPT.fullmatch(response)
    return found and found.group(1)


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return
