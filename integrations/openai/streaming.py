"""Server-sent events, as OpenAI's clients read them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from .errors import Refused, body_of, describe
from .service import connected

DONE = format_sse_event(data_str="[DONE]")
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies pass events on at once


def event_stream(chunks: AsyncIterator[BaseModel | dict]) -> StreamingResponse:
    """Every chunk as an event, then [DONE]. An error on the way is the last event.

    What comes once per token is better a dict in the form of openai's type: making one of their models takes longer
    than all the rest of an event.
    """

    async def events():
        try:
            async for chunk in chunks:
                yield format_sse_event(data_str=_json(chunk))
        except Exception as error:
            yield format_sse_event(data_str=_json(body_of(describe(error))))
        else:
            yield DONE

    return sent(events())


def sent(events: AsyncIterator[bytes]) -> StreamingResponse:
    """Events that are ready to be sent, and tell of errors themselves."""
    return _EventStream(events, media_type="text/event-stream", headers=HEADERS)


class _EventStream(StreamingResponse):
    """Ends the stream when the client goes away. (Starlette does so with a group of tasks, at several times the cost.)"""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(Refused):
            async with contextlib.aclosing(self.body_iterator), connected(receive):
                await self.stream_response(send)


def _json(value: BaseModel | dict) -> str:
    if isinstance(value, BaseModel):
        return value.model_dump_json(exclude_unset=True)
    return to_json(value, inf_nan_mode="null").decode()
