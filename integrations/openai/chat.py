"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from openai.types.chat import ChatCompletion

from .body import strict_router
from .conversation import Answer, Conversation, Step
from .described import GENERATES, answers
from .errors import Refused
from .logprobs import chat_logprobs, prompt_logprobs
from .pieces import CallArguments, CallBegins, Content, Finished, Piece, Reasoning
from .protocol import ChatCompletionRequest
from .service import Service, first_of, new_id, while_connected
from .streaming import event_stream
from .tools import choice_of, tools_of


def router(service: Service) -> APIRouter:
    routes = strict_router()

    @routes.post(
        "/v1/chat/completions",
        response_model=None,
        responses=answers(*GENERATES, whole=ChatCompletion, events="ChatCompletionChunk, then [DONE]"),
    )
    async def create(body: ChatCompletionRequest, request: Request):
        """Answer a conversation."""
        run = await _Run.prepare(service, body, service.adapter(body.model))
        if body.stream:
            return event_stream(await while_connected(request, first_of(run.chunks())))
        return await while_connected(request, run.whole())

    return routes


class _Run:
    """A conversation in the form of chat completions."""

    def __init__(self, service: Service, body: ChatCompletionRequest, name: str, adapter, conversation: Conversation):
        self._body, self._conversation = body, conversation
        self._head = {"id": name, "created": int(time.time()), "model": adapter or service.model_name}
        self._begun: set[int] = set()  # answers whose role was told

    @classmethod
    async def prepare(cls, service: Service, body: ChatCompletionRequest, adapter: str | None) -> _Run:
        if body.top_logprobs is not None and not body.logprobs:
            raise Refused("top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
        if body.echo and not body.continue_final_message:
            raise Refused("echo needs continue_final_message: true", param="echo", code="invalid_value")
        if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
            raise Refused("max_tokens and max_completion_tokens differ", param="max_tokens", code="invalid_value")
        name = new_id("chatcmpl") if body.request_id is None else body.request_id
        conversation = await Conversation.prepare(
            service,
            body.messages,
            body,
            request_id=name,
            adapter=adapter,
            max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template=body.chat_template,
            chat_template_kwargs=body.chat_template_kwargs,
            documents=body.documents,
            tools=tools_of(tool.function for tool in body.tools or ()),
            tool_choice=choice_of(body.tool_choice),
            parallel_tool_calls=body.parallel_tool_calls,
            reasoning_effort=body.reasoning_effort,
        )
        return cls(service, body, name, adapter, conversation)

    async def chunks(self) -> AsyncIterator[dict]:
        """In the form of openai's ChatCompletionChunk."""
        options = self._body.stream_options
        usage = self._conversation.usage
        async for step in self._conversation.steps():
            counted = usage.as_dict() if options is not None and options.continuous_usage_stats else None
            if step.index not in self._begun:
                self._begun.add(step.index)
                delta = {"role": "assistant", "content": self._echoed() or (None if self._body.tools else "")}
                yield self._chunk([{"index": step.index, "delta": delta, "finish_reason": None}], counted)
            for choice in self._choices(step):
                yield self._chunk([choice], counted)
        if options is not None and options.include_usage:
            yield self._chunk([], usage.as_dict())

    def _choices(self, step: Step) -> list[dict]:
        """A chunk for each piece. The first has the step's tokens, the last the reason to have finished."""
        pieces, finished = step.pieces, None
        if pieces and isinstance(pieces[-1], Finished):
            pieces, finished = pieces[:-1], pieces[-1]
        deltas = [_delta(piece) for piece in pieces if self._body.include_reasoning or not isinstance(piece, Reasoning)]
        tokens = self._tokens(step)
        if not deltas:
            if finished is None and not tokens:
                return []  # all of it is held back
            deltas = [{} if self._body.tools else {"content": ""}]
        choices: list[dict] = [{"index": step.index, "delta": delta, "finish_reason": None} for delta in deltas]
        choices[0] |= tokens
        if finished is not None:
            choices[-1] |= _ending(finished)
        return choices

    async def whole(self) -> ChatCompletion:
        answers = await self._conversation.answers()
        extra = {}
        if self._body.prompt_logprobs is not None:
            extra["prompt_logprobs"] = prompt_logprobs(self._conversation.prompt_logprobs)
        if self._body.return_token_ids:
            extra["prompt_token_ids"] = self._conversation.prompt_token_ids
        choices = [self._choice(answer) for answer in answers]
        usage = self._conversation.usage.as_dict()
        return ChatCompletion.model_construct(**self._head, object="chat.completion", choices=choices, usage=usage, **extra)

    def _choice(self, answer: Answer) -> dict:
        content = answer.content
        if self._body.echo:
            content = self._echoed() + (content or "")
        message: dict = {"role": "assistant", "content": content, "refusal": None}
        if answer.reasoning is not None and self._body.include_reasoning:
            message |= _thought(answer.reasoning)
        if answer.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in answer.calls
            ]
        choice = {"index": answer.index, "message": message, "logprobs": None}
        return choice | self._tokens(answer) | _ending(answer.finished)

    def _echoed(self) -> str:
        return self._body.messages[-1].text if self._body.echo else ""

    def _tokens(self, part: Step | Answer) -> dict:
        extras: dict = {}
        if self._body.logprobs:
            num_top = self._body.top_logprobs or 0
            extras["logprobs"] = chat_logprobs(part.token_ids, part.logprobs or [], num_top)
        if self._body.return_token_ids:
            extras["token_ids"] = part.token_ids
        return extras

    def _chunk(self, choices: list[dict], usage: dict | None) -> dict:
        return self._head | {"object": "chat.completion.chunk", "choices": choices, "usage": usage}


def _delta(piece: Piece) -> dict:
    match piece:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return _thought(text)
        case CallBegins(index, id, name):
            call = {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}
            return {"tool_calls": [call]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
    raise AssertionError(piece)


def _thought(text: str) -> dict:
    """Under both names that clients look for it."""
    return {"reasoning_content": text, "reasoning": text}


def _ending(finished: Finished) -> dict:
    ending: dict = {"finish_reason": finished.reason}
    if finished.stop_reason is not None:
        ending["stop_reason"] = finished.stop_reason
    return ending
