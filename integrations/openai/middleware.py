"""What looks at every request before its route does."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import Refused, answer


class LimitBody:
    """Answers 413 to bodies of more than `limit` bytes, without keeping them; 408 to those that take `timeout` seconds."""

    def __init__(self, app: ASGIApp, limit: int, timeout: float):
        self._app, self._limit, self._timeout = app, limit, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        if length and b"transfer-encoding" in headers:  # a proxy in front may have taken the other for the body's end
            two = Refused("Content-Length and Transfer-Encoding exclude each other", code="two_lengths")
            return await _refuse(two, scope, receive, send)
        if length.isdigit() and int(length) > self._limit:
            return await _refuse(self._too_long(), scope, receive, send)
        loop = asyncio.get_running_loop()
        seen, whole, until = 0, False, loop.time() + self._timeout
        problem: Refused | None = None  # what is answered then, whatever the app makes of a body that it cannot read
        begun = False

        async def counted() -> Message:
            nonlocal seen, whole, problem
            if whole:  # what comes now is the end of the connection, and may take its time
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                problem = Refused(f"the body took more than {self._timeout:g} s", status=408, code="body_too_slow")
                raise problem from None
            whole = not message.get("more_body", False)
            seen += len(message.get("body", b""))
            if seen > self._limit:
                problem = self._too_long()
                raise problem
            return message

        async def noted(message: Message) -> None:
            nonlocal begun
            if problem is None or begun:
                begun = True
                await send(message)

        try:
            await self._app(scope, counted, noted)
        except Refused:
            if problem is None or begun:
                raise
        if problem is not None and not begun:
            await _refuse(problem, scope, receive, send)

    def _too_long(self) -> Refused:
        return Refused(f"the body is longer than {self._limit} bytes", status=413, code="body_too_long")


async def _refuse(error: Refused, scope: Scope, receive: Receive, send: Send) -> None:
    """The connection ends with it: the rest of the body is still to come."""
    response = answer(error)
    response.headers["Connection"] = "close"
    await response(scope, receive, send)
