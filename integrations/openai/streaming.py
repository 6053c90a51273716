"""Server-sent events, as OpenAI's clients read them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from pydantic import BaseModel

from .errors import body_of, describe

DONE = format_sse_event(data_str="[DONE]")
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies pass events on at once


def event_stream(chunks: AsyncIterator[BaseModel]) -> StreamingResponse:
    """Every chunk as an event, then [DONE]. An error on the way is the last event."""

    async def events():
        try:
            async for chunk in chunks:
                yield format_sse_event(data_str=chunk.model_dump_json(exclude_unset=True))
        except Exception as error:
            yield format_sse_event(data_str=json.dumps(body_of(describe(error))))
        else:
            yield DONE

    return StreamingResponse(events(), media_type="text/event-stream", headers=HEADERS)
