"""How a server ends: what runs comes to its end, nothing new is taken."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from ...base.errors import EngineClosed
from ...engine.async_engine import AsyncEngine
from .auth import OPEN, path_of
from .errors import Refused, answer

WATCHED = OPEN | {"/metrics"}  # what is answered to the end, so that whoever watches sees it coming


class Drain:
    """
    Attributes:
        draining: whether new requests are refused, and /health says so.
        open: HTTP requests under way.
    """

    def __init__(self, engine: AsyncEngine):
        self._engine = engine
        self.draining = False
        self.open = 0

    def begin(self) -> None:
        """Take no more requests."""
        self.draining = True

    async def cut(self, patience: float) -> None:
        """End what still runs, each with an error that its client is told; waits `patience` seconds for that to be sent."""
        loop = asyncio.get_running_loop()
        until = loop.time() + patience
        while self.open and loop.time() < until:  # again and again, for those that were on their way to the engine
            error = EngineClosed("the server is going down")
            await asyncio.to_thread(self._engine.engine.fail_all, error)
            await asyncio.sleep(0.05)


class Draining:
    """Counts requests for `drain`, and answers 503 to those that come too late."""

    def __init__(self, app: ASGIApp, drain: Drain):
        self._app, self._drain = app, drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if self._drain.draining and path_of(scope) not in WATCHED:
            response = answer(Refused("the server is going down", status=503, code="closed"))
            response.headers["Connection"] = "close"
            return await response(scope, receive, send)
        self._drain.open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._drain.open -= 1
