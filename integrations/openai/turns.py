"""Requests begin a few at a time, so that many that come at once do not keep those under way waiting."""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.types import ASGIApp, Receive, Scope, Send

MOST = 4  # requests that begin in one turn of the event loop: each takes it a fraction of a millisecond


class TakeTurns:
    """Lets `MOST` requests begin in each turn of the event loop, in the order they came.

    The loop does all that is ready before it looks at anything else: hundreds of new requests, each of which has to be
    parsed, checked and handed to the engine, would hold up every stream until the last of them is.
    """

    def __init__(self, app: ASGIApp):
        self._app = app
        self._waiting: deque[asyncio.Future] = deque()
        self._left = MOST  # to begin in this turn
        self._counting = False  # whether the next turn will be noticed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._turn()
        await self._app(scope, receive, send)

    async def _turn(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._counting:
            self._counting = True
            loop.call_soon(self._next, loop)
        if self._left and not self._waiting:
            self._left -= 1
            return
        mine = loop.create_future()
        self._waiting.append(mine)
        await mine

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        """A turn of the loop."""
        self._left = MOST
        while self._left and self._waiting:
            first = self._waiting.popleft()
            if not first.done():  # else its client has gone
                first.set_result(None)
                self._left -= 1
        self._counting = self._left < MOST
        if self._counting:
            loop.call_soon(self._next, loop)
