"""/v1/completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial

from fastapi import APIRouter, Request
from openai.types import Completion

from ...base.types import CompletionDelta, RequestDelta
from .body import strict_router
from .described import GENERATES, answers
from .errors import Refused
from .logprobs import CompletionLogprobs, prompt_logprobs
from .protocol import CompletionRequest
from .sampling import sampling_params
from .service import Job, Service, Usage, as_list, first_of, jobs_of, new_id, while_connected
from .streaming import event_stream


def router(service: Service) -> APIRouter:
    routes = strict_router()

    @routes.post(
        "/v1/completions",
        response_model=None,
        responses=answers(*GENERATES, whole=Completion, events="Completion, then [DONE]"),
    )
    async def create(body: CompletionRequest, request: Request):
        """Complete one prompt or several."""
        make = partial(_Run, service, body, service.adapter(body.model))
        run = make() if body.add_special_tokens else await asyncio.to_thread(make)  # which cuts texts into tokens
        if body.stream:
            return event_stream(await while_connected(request, first_of(run.chunks())))
        return await while_connected(request, run.whole())

    return routes


class _Run:
    """One request for completions on its way."""

    def __init__(self, service: Service, body: CompletionRequest, adapter: str | None):
        self._service, self._body, self._adapter = service, body, adapter
        self._id = new_id("cmpl") if body.request_id is None else body.request_id
        self._head = {
            "id": self._id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": adapter or service.model_name,
        }
        self._usage = Usage()
        self._only_prompt = body.echo and body.max_tokens == 0  # what scores a text asks for
        self._jobs = self._make_jobs()
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def _make_jobs(self) -> list[Job]:
        body, limits = self._body, self._service.settings.limits
        if body.suffix is not None:
            raise Refused("suffix is not supported", param="suffix", code="unsupported")
        if body.best_of not in (None, body.n):
            raise Refused("best_of is not supported; use n", param="best_of", code="unsupported")
        if body.echo and body.stream:
            raise Refused("echo and stream exclude each other", param="echo", code="unsupported")
        max_tokens = self._service.settings.default_max_tokens if body.max_tokens is None else body.max_tokens
        params = sampling_params(
            body if not (body.echo and body.logprobs is not None) else body.model_copy(update={"prompt_logprobs": body.logprobs}),
            self._service.defaults,
            limits,
            max_tokens=1 if self._only_prompt else max_tokens,
            logprobs=body.logprobs,
        )
        prompts = as_list(body.prompt)
        if not prompts:
            raise Refused("prompt is empty", param="prompt", code="invalid_value")
        if len(prompts) > limits.prompts:
            raise Refused(f"prompt: {len(prompts)} are more than the {limits.prompts} allowed", param="prompt", code="too_many")
        if len(prompts) * body.n > limits.completions and len(prompts) > 1:
            raise Refused(f"prompt times n: more than {limits.completions} completions", param="n", code="too_many")
        for prompt in prompts:
            if isinstance(prompt, str):
                self._service.check_length("prompt", prompt)
        tokenizer = self._service.tokenizer
        if not body.add_special_tokens:
            prompts = [tokenizer(p, add_special_tokens=False).input_ids if isinstance(p, str) else p for p in prompts]
        user = self._service.share(body)
        return jobs_of(prompts, params, body, request_id=self._id, user=user, adapter=self._adapter)

    async def chunks(self) -> AsyncIterator[dict]:
        """In the form of openai's Completion."""
        options = self._body.stream_options
        async for place, delta in self._service.merged(self._jobs):
            self._usage.add(place, delta)
            usage = self._usage.as_dict() if options is not None and options.continuous_usage_stats else None
            for completion in delta.outputs:
                yield self._completion([self._choice(place, completion, delta)], usage)
        if options is not None and options.include_usage:
            yield self._completion([], self._usage.as_dict())

    async def whole(self) -> Completion:
        wholes = await self._service.finished(self._jobs, self._usage)
        choices = [
            self._choice(place, completion, whole) for place, whole in enumerate(wholes) for completion in whole.outputs
        ]
        if self._only_prompt:
            self._usage.completion = 0
        return Completion.model_construct(**self._completion(choices, self._usage.as_dict()))

    def _choice(self, place: int, completion: CompletionDelta, delta: RequestDelta) -> dict:
        body = self._body
        index = place * body.n + completion.index
        text, tokens, entries = completion.text, completion.token_ids, completion.logprobs
        if self._only_prompt:
            text, tokens, entries = "", [], []
        if body.echo:
            prompt = self._jobs[place].prompt
            text = (prompt if isinstance(prompt, str) else self._service.tokenizer.decode(prompt)) + text
        choice = {"index": index, "text": text, "finish_reason": completion.finish_reason, "logprobs": None}
        if self._only_prompt:
            choice["finish_reason"] = "length"
        if body.logprobs is not None:
            lists = self._logprobs.setdefault(index, CompletionLogprobs(body.logprobs))
            if body.echo:
                tokens, entries = delta.prompt_token_ids + tokens, (delta.prompt_logprobs or []) + (entries or [])
            choice["logprobs"] = lists.lists(tokens, entries or [])
        if completion.stop_reason is not None:
            choice["stop_reason"] = completion.stop_reason
        if body.prompt_logprobs is not None and delta.finished:
            choice["prompt_logprobs"] = prompt_logprobs(delta.prompt_logprobs)
        if body.return_token_ids:
            choice |= {"token_ids": tokens, "prompt_token_ids": delta.prompt_token_ids}
        return choice

    def _completion(self, choices: list[dict], usage: dict | None) -> dict:
        return self._head | {"choices": choices, "usage": usage}
