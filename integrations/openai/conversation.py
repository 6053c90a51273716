"""A conversation on its way to its answers, for every route that has one: a stream of pieces, or whole answers made of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from ...base.types import CompletionDelta, Logprob
from .errors import Refused
from .pieces import CallArguments, CallBegins, Content, Finished, Piece, Reasoning
from .protocol import Generation, Message
from .sampling import sampling_params
from .service import Job, Service, Usage
from .templates import chat_tokens
from .tools import Tool, ToolChoice


@dataclass(frozen=True, slots=True)
class Step:
    """What was added to one answer since the last step of it.

    Attributes:
        index: of the answer, 0 to n - 1.
        pieces: in their order; none while text is held back that may become a marker. `Finished` ends an answer, once.
        token_ids: the new tokens, whatever piece they went into: all steps' together are the answer's tokens.
        logprobs: one entry for each of them; None if they were not asked for.
    """

    index: int
    pieces: list[Piece]
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None


@dataclass(slots=True)
class Call:
    """One call of an answer; `arguments` is JSON text, as the model wrote it: cut off where the answer is."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Answer:
    """A whole answer: all its steps together.

    Attributes:
        content: None if the model said nothing but calls.
        reasoning: None if there was none.
    """

    index: int
    content: str | None = None
    reasoning: str | None = None
    calls: list[Call] = field(default_factory=list)
    finished: Finished | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None

    def add(self, step: Step) -> None:
        self.token_ids += step.token_ids
        if step.logprobs is not None:
            self.logprobs = (self.logprobs or []) + step.logprobs
        for piece in step.pieces:
            match piece:
                case Content(text):
                    self.content = (self.content or "") + text
                case Reasoning(text):
                    self.reasoning = (self.reasoning or "") + text
                case CallBegins(_, id, name):
                    self.calls.append(Call(id, name))
                case CallArguments(index, text):
                    self.calls[index].arguments += text
                case Finished():
                    self.finished = piece
        if self.finished and self.content is None and not self.calls:
            self.content = ""


class Conversation:
    """One request's answers, of which there are `generation.n`.

        conversation = await Conversation.prepare(service, messages, generation, request_id=name, max_tokens=100)
        async for step in conversation.steps():       # or: answers = await conversation.answers()
            for piece in step.pieces: ...

    Everything wrong with a request is raised by `prepare`, or by the first iteration of `steps` (the engine's part: see
    `service.first_of`). Leaving the iteration, or cancelling `answers`, ends the request within one step of the engine.

    Attributes:
        usage: tokens as far as they have come.
        prompt_token_ids: of the whole prompt, the template's tokens included.
        prompt_logprobs: at the end, if asked for.
    """

    def __init__(self, service: Service, job: Job):
        self._service, self._job = service, job
        self.usage = Usage()
        self.prompt_token_ids: list[int] = job.prompt
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @classmethod
    async def prepare(
        cls,
        service: Service,
        messages: list[Message],
        generation: Generation,
        *,
        request_id: str,
        max_tokens: int | None,
        logprobs: int | None = None,
        tools: Sequence[Tool] = (),
        tool_choice: ToolChoice | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: dict | None = None,
        documents: list[dict] | None = None,
    ) -> Conversation:
        """
        Args:
            messages: the conversation so far.
            generation: how to sample, stop and shape the answers; its `max_tokens`, `stream` and `request_id` are not
                read here.
            request_id: the engine's name of the request, for `engine.abort`.
            max_tokens: most tokens of each answer, whatever piece they go into; None: as many as fit.
            logprobs: how many most likely tokens to report beside each; None: report nothing.
            tools: functions the model may call.
            tool_choice: None is "auto".

        Raises Refused (with `param` of a chat completion's field) and InvalidArgument.
        """
        if tools and (tool_choice is None or tool_choice.mode != "none"):
            raise Refused("tools: this model has no form of calls that the server knows", param="tools", code="unsupported")
        params = sampling_params(
            generation, service.defaults, service.settings.limits, max_tokens=max_tokens, logprobs=logprobs
        )
        tokens = await asyncio.to_thread(
            chat_tokens,
            service,
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            documents=documents,
        )
        job = Job(
            prompt=tokens,
            params=params,
            request_id=request_id,
            priority=generation.priority,
            cache_salt=generation.cache_salt,
        )
        return cls(service, job)

    async def steps(self) -> AsyncIterator[Step]:
        """What comes, as it comes. To be iterated once."""
        async with contextlib.aclosing(self._service.merged([self._job])) as deltas:
            async for _, delta in deltas:
                self.usage.add(0, delta)
                if delta.prompt_logprobs is not None:
                    self.prompt_logprobs = delta.prompt_logprobs
                for completion in delta.outputs:
                    yield Step(completion.index, _pieces(completion), completion.token_ids, completion.logprobs)

    async def answers(self) -> list[Answer]:
        """All answers, whole, by their index."""
        answers: dict[int, Answer] = {}
        async with contextlib.aclosing(self.steps()) as steps:
            async for step in steps:
                answers.setdefault(step.index, Answer(step.index)).add(step)
        return [answers[index] for index in sorted(answers)]


def _pieces(completion: CompletionDelta) -> list[Piece]:
    pieces: list[Piece] = [Content(completion.text)] if completion.text else []
    if completion.finish_reason is not None:
        pieces.append(Finished(completion.finish_reason, completion.stop_reason))
    return pieces
