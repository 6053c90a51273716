"""A conversation on its way to its answers, for all routes that have one: a stream of pieces, or whole answers of them."""

from __future__ import annotations

import asyncio
import contextlib
from bisect import bisect_left
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

from ...base.errors import InvalidArgument
from ...base.types import CompletionDelta, Logprob
from .errors import Refused
from .parsing import AnswerReader, Dialect, answer_form
from .pieces import CallArguments, CallBegins, Content, Finished, Piece, Reasoning, merged
from .protocol import Generation, Message
from .sampling import sampling_params
from .service import Job, Service, Usage
from .templates import Prompt, chat_prompt
from .tools import Tool, ToolChoice, schema_fault, usable_tools


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

    def __init__(
        self, service: Service, job: Job, prompt: Prompt, dialect: Dialect, tools: dict[str, Tool], one_call: bool
    ):
        self._service, self._job, self._prompt = service, job, prompt
        self._dialect, self._tools, self._one_call = dialect, tools, one_call
        self._state = dialect.state(prompt.text, prompt.continued)
        self._answers: dict[int, _Answering] = {}
        self.usage = Usage(reasoning=0)
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
        adapter: str | None = None,
        logprobs: int | None = None,
        tools: Sequence[Tool] = (),
        tool_choice: ToolChoice | None = None,
        parallel_tool_calls: bool = True,
        reasoning_effort: str | None = None,
        image_names: Sequence[str] | None = None,
        **template,
    ) -> Conversation:
        """
        Args:
            messages: the conversation so far.
            generation: how to sample, stop and shape the answers; its `max_tokens`, `stream` and `request_id` are not
                read here. The form it asks for is that of the content: reasoning comes before it.
            request_id: the engine's name of the request, for `engine.abort`.
            adapter: see `Service.adapter`.
            max_tokens: most tokens of each answer, whatever piece they go into; None: as many as fit.
            logprobs: how many most likely tokens to report beside each; None: report nothing.
            tools: functions the model may call.
            tool_choice: None is "auto".
            parallel_tool_calls: whether an answer may have more calls than one.
            reasoning_effort: for the chat template.
            image_names: see `chat_prompt`.
            template: more of `chat_prompt`'s: add_generation_prompt, continue_final_message, chat_template,
                chat_template_kwargs, documents.

        Raises Refused (with `param` of a chat completion's field) and InvalidArgument.
        """
        limits = service.settings.limits
        params = sampling_params(generation, service.defaults, limits, max_tokens=max_tokens, logprobs=logprobs)
        choice = tool_choice or ToolChoice()
        usable = usable_tools(tools, choice, limits)
        if usable and service.dialect.calls is None:
            message = "tools: how this model writes calls is not known; start the server with a tool_parser"
            raise Refused(message, param="tools", code="unsupported")
        listed = list(usable.values())
        prompt = await chat_prompt(
            service, messages, tools=listed, reasoning_effort=reasoning_effort, image_names=image_names, **template
        )
        job = Job(
            prompt=prompt.token_ids,
            media=prompt.media,
            params=params,
            request_id=request_id,
            priority=generation.priority,
            user=service.share(generation),
            cache_salt=generation.cache_salt,
            adapter=adapter,
        )
        conversation = cls(
            service, job, prompt, service.dialect.with_calls(bool(usable)), usable, not parallel_tool_calls
        )
        if usable or params.structured_outputs is not None:
            await asyncio.to_thread(conversation._demand, choice.mode == "required")  # it may make a grammar
        else:
            conversation._demand(choice.mode == "required")
        return conversation

    def _demand(self, required: bool) -> None:
        """Have the formats see their marks, and the answers take the form they must have."""
        params, tools, changes = self._job.params, list(self._tools.values()), {}
        if params.skip_special_tokens and self._dialect.markers:
            changes["keep_special_token_ids"] = tuple(self._dialect.markers.values())
        form = params.structured_outputs
        if required and form is not None:
            message = "tool_choice: calls that must come and a form of the answer exclude each other"
            raise Refused(message, param="tool_choice", code="invalid_value")
        try:
            demanded = answer_form(self._dialect, self._state, form, tools, required=required, one_call=self._one_call)
            if demanded is not form:
                changes["structured_outputs"] = demanded
            if changes:
                self._job = replace(self._job, params=replace(params, **changes))
        except (InvalidArgument, ValueError) as error:
            raise self._blamed(error) from error

    def _blamed(self, error: Exception) -> Exception:
        """What is wrong with a grammar that was made of tools is said of the tools; with an adapter, of the model's name."""
        message = str(error)
        if isinstance(error, InvalidArgument) and message.startswith("adapter "):
            return Refused(f"model: {message}", param="model", code="unsupported")
        if not self._tools or isinstance(error, InvalidArgument) and not message.startswith("structured_outputs"):
            return error
        if "needs the package" in message:
            return Refused(message.replace("structured_outputs", "tools", 1), param="tools", code="unsupported")
        fault = schema_fault(list(self._tools.values()))
        if fault is None:
            return Refused(
                f"tools: {message.removeprefix('structured_outputs: ')}", param="tools", code="invalid_value"
            )
        name = f"tools.{fault[0]}.function.parameters"
        return Refused(f"{name}: {fault[1]}", param=name, code="invalid_value")

    async def steps(self) -> AsyncIterator[Step]:
        """What comes, as it comes. To be iterated once."""
        try:
            async with contextlib.aclosing(self._service.merged([self._job])) as deltas:
                async for _, delta in deltas:
                    self.usage.add(0, delta)
                    if delta.prompt_logprobs is not None:
                        self.prompt_logprobs = delta.prompt_logprobs
                    for completion in delta.outputs:
                        yield Step(
                            completion.index, self._pieces(completion), completion.token_ids, completion.logprobs
                        )
        except InvalidArgument as error:
            raise await asyncio.to_thread(self._blamed, error) from error

    async def answers(self) -> list[Answer]:
        """All answers, whole, by their index."""
        answers: dict[int, Answer] = {}
        async with contextlib.aclosing(self.steps()) as steps:
            async for step in steps:
                answers.setdefault(step.index, Answer(step.index)).add(step)
        return [answers[index] for index in sorted(answers)]

    def _pieces(self, completion: CompletionDelta) -> list[Piece]:
        reason, called = completion.finish_reason, False
        if self._dialect.silent:
            pieces: list[Piece] = [Content(completion.text)] if completion.text else []
        else:
            answering = self._answers.get(completion.index)
            if answering is None:
                answering = self._answers[completion.index] = self._new_answering()
            pieces = answering.feed(completion)
            called = answering.reader.called
            self.usage.reasoning += answering.num_reasoning
        if reason is not None:
            pieces.append(Finished("tool_calls" if called and reason == "stop" else reason, completion.stop_reason))
        return pieces

    def _new_answering(self) -> _Answering:
        reader = AnswerReader(
            self._dialect,
            self._tools,
            prompt=self._prompt.text,
            state=self._state,
            one_call=self._one_call,
            hide_markers=self._job.params.skip_special_tokens,
        )
        return _Answering(reader, self._service.tokenizer)


class _Answering:
    """One answer as far as it has come.

    Attributes:
        num_reasoning: tokens of the last delta that were reasoning, up to the mark that ends it.
    """

    def __init__(self, reader: AnswerReader, tokenizer):
        self.reader, self._tokenizer = reader, tokenizer
        self._characters = 0
        self.num_reasoning = 0

    def feed(self, completion: CompletionDelta) -> list[Piece]:
        turns = len(self.reader.turns)
        pieces = self.reader.feed(completion.text)
        if completion.finish_reason is not None:
            pieces = merged(pieces + self.reader.end())
        self._count(completion, turns)
        self._characters += len(completion.text)
        return pieces

    def _count(self, completion: CompletionDelta, turns: int) -> None:
        """Reasoning begins or ends with the token whose text reaches up to there."""
        reasoning, begun, self.num_reasoning = turns % 2 == 1, 0, 0
        ids = completion.token_ids
        for turn in self.reader.turns[turns:]:
            place = self._num_tokens(ids, turn - self._characters)
            self.num_reasoning += place - begun if reasoning else 0
            reasoning, begun = not reasoning, place
        self.num_reasoning += len(ids) - begun if reasoning else 0

    def _num_tokens(self, ids: list[int], characters: int) -> int:
        """The fewest of the first tokens that have so many characters of text."""
        return bisect_left(range(len(ids)), characters, key=lambda count: len(self._tokenizer.decode(ids[:count])))
