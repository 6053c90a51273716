"""Streams as they go over the wire: every event is what openai's types say, and readers do not hold each other up."""

from __future__ import annotations

import json

import httpx
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk
from server_parts import MODEL


def events(url: str, route: str, **body) -> list[str]:
    body = {"model": MODEL, "stream": True, "temperature": 0, "max_tokens": 6, **body}
    with httpx.stream("POST", f"{url}/v1/{route}", json=body) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


@pytest.mark.parametrize("more", [{}, {"logprobs": True, "top_logprobs": 2}, {"n": 2}])
def test_events_of_a_chat_are_chunks(url, more):
    messages = [{"role": "user", "content": "Say \"what\"\nis\tthis \u2028 \N{GRINNING FACE}?"}]
    *chunks, usage, done = events(
        url, "chat/completions", messages=messages, echo=False, stream_options={"include_usage": True}, **more
    )
    assert done == "[DONE]"
    parsed = [ChatCompletionChunk.model_validate(json.loads(chunk), strict=True) for chunk in chunks]
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in parsed}) == 1
    for index in range(more.get("n", 1)):
        mine = [choice for chunk in parsed for choice in chunk.choices if choice.index == index]
        assert [choice.delta.role for choice in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert [choice.finish_reason is None for choice in mine] == [True] * (len(mine) - 1) + [False]
        if "logprobs" in more:
            assert sum(len(choice.logprobs.content) for choice in mine if choice.logprobs) == 6
    last = ChatCompletionChunk.model_validate(json.loads(usage), strict=True)
    assert not last.choices and last.usage.completion_tokens == 6 * more.get("n", 1)


def test_events_of_a_completion_are_completions(url):
    *chunks, done = events(url, "completions", prompt="Tell me", logprobs=1)
    assert done == "[DONE]"
    for chunk in map(json.loads, chunks):
        for choice in chunk["choices"][:1]:  # openai's type wants a reason of running choices, too
            choice["finish_reason"] = choice["finish_reason"] or "length"
        assert len(Completion.model_validate(chunk, strict=True).choices) == 1
