"""How late the event loop is: what everything on it waits, beside the engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

INTERVAL = 0.05  # seconds from one look to the next


@contextlib.asynccontextmanager
async def watched_loop(observe: Callable[[float], None]) -> AsyncIterator[None]:
    """Scope in which the running loop is looked at every `INTERVAL`.

    Args:
        observe: called with the seconds that each look came too late. Looks that fell into one long delay count all:
            what share of the time the loop was how late can be told from the numbers.
    """
    task = asyncio.create_task(_look(observe))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _look(observe: Callable[[float], None]) -> None:
    loop = asyncio.get_running_loop()
    due = loop.time()
    while True:
        due += INTERVAL
        await asyncio.sleep(due - loop.time())
        now = loop.time()
        observe(now - due)
        while due + INTERVAL <= now:
            due += INTERVAL
            observe(now - due)
