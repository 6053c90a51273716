"""Server-sent events, as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from pydantic import BaseModel
from pydantic_core import to_json

from .errors import body_of, describe

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

    return StreamingResponse(events(), media_type="text/event-stream", headers=HEADERS)


def _json(value: BaseModel | dict) -> str:
    if isinstance(value, BaseModel):
        return value.model_dump_json(exclude_unset=True)
    return to_json(value, inf_nan_mode="null").decode()
