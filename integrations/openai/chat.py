"""/v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from ...base.types import CompletionDelta
from .errors import Refused
from .logprobs import chat_logprobs, prompt_logprobs
from .protocol import ChatCompletionRequest
from .sampling import sampling_params
from .service import Job, Service, Usage, first_of, new_id, while_connected
from .streaming import event_stream
from .templates import chat_tokens


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions", response_model=None)
    async def create(body: ChatCompletionRequest, request: Request):
        """Answer a conversation."""
        service.check_model(body.model)
        run = await _Run.prepare(service, body)
        if body.stream:
            return event_stream(await first_of(run.chunks()))
        return await while_connected(request, run.whole())

    return routes


class _Run:
    """One conversation on its way to its answers."""

    def __init__(self, service: Service, body: ChatCompletionRequest, job: Job):
        self._service, self._body, self._job = service, body, job
        self._created = int(time.time())
        self._usage = Usage()
        self._begun: set[int] = set()  # completions whose role was told

    @classmethod
    async def prepare(cls, service: Service, body: ChatCompletionRequest) -> _Run:
        limits = service.settings.limits
        if body.top_logprobs is not None and not body.logprobs:
            raise Refused("top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
        if body.echo and not body.continue_final_message:
            raise Refused("echo needs continue_final_message: true", param="echo", code="invalid_value")
        if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
            raise Refused("max_tokens and max_completion_tokens differ", param="max_tokens", code="invalid_value")
        given = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        params = sampling_params(body, service.defaults, limits, max_tokens=given, logprobs=logprobs)
        tokens = await asyncio.to_thread(
            chat_tokens,
            service,
            body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template=body.chat_template,
            chat_template_kwargs=body.chat_template_kwargs,
            documents=body.documents,
        )
        name = new_id("chatcmpl") if body.request_id is None else body.request_id
        job = Job(prompt=tokens, params=params, request_id=name, priority=body.priority, cache_salt=body.cache_salt)
        return cls(service, body, job)

    async def chunks(self) -> AsyncIterator[ChatCompletionChunk]:
        options = self._body.stream_options
        async for place, delta in self._service.merged([self._job]):
            self._usage.add(place, delta)
            usage = self._usage.as_dict() if options is not None and options.continuous_usage_stats else None
            for completion in delta.outputs:
                if completion.index not in self._begun:
                    self._begun.add(completion.index)
                    yield self._chunk([self._opening(completion.index)], usage)
                yield self._chunk([self._step(completion)], usage)
        if options is not None and options.include_usage:
            yield self._chunk([], self._usage.as_dict())

    def _opening(self, index: int) -> dict:
        return {"index": index, "delta": {"role": "assistant", "content": self._echoed()}, "finish_reason": None}

    def _step(self, completion: CompletionDelta) -> dict:
        choice = {"index": completion.index, "delta": {"content": completion.text}, "finish_reason": completion.finish_reason}
        return choice | self._extras(completion)

    async def whole(self) -> ChatCompletion:
        [whole] = await self._service.finished([self._job], self._usage)
        extra = {}
        if self._body.prompt_logprobs is not None:
            extra["prompt_logprobs"] = prompt_logprobs(whole.prompt_logprobs)
        if self._body.return_token_ids:
            extra["prompt_token_ids"] = whole.prompt_token_ids
        choices = [self._choice(completion) for completion in whole.outputs]
        return ChatCompletion.model_construct(
            **self._head("chat.completion"), choices=choices, usage=self._usage.as_dict(), **extra
        )

    def _choice(self, completion: CompletionDelta) -> dict:
        message = {"role": "assistant", "content": self._echoed() + completion.text, "refusal": None}
        choice = {"index": completion.index, "message": message, "finish_reason": completion.finish_reason, "logprobs": None}
        return choice | self._extras(completion)

    def _echoed(self) -> str:
        if not self._body.echo:
            return ""
        content = self._body.messages[-1].content
        return content if isinstance(content, str) else "".join(part.text for part in content or ())

    def _extras(self, completion: CompletionDelta) -> dict:
        extras: dict = {}
        if self._body.logprobs:
            num_top = self._body.top_logprobs or 0
            extras["logprobs"] = chat_logprobs(completion.token_ids, completion.logprobs or [], num_top)
        if completion.stop_reason is not None:
            extras["stop_reason"] = completion.stop_reason
        if self._body.return_token_ids:
            extras["token_ids"] = completion.token_ids
        return extras

    def _chunk(self, choices: list[dict], usage: dict | None) -> ChatCompletionChunk:
        return ChatCompletionChunk.model_construct(**self._head("chat.completion.chunk"), choices=choices, usage=usage)

    def _head(self, kind: str) -> dict:
        return {"id": self._job.request_id, "object": kind, "created": self._created, "model": self._service.model_name}
