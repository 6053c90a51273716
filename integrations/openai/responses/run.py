"""One response on its way: in front of a waiting client, or in the background."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import AsyncIterator

from ..conversation import Conversation, Step
from ..errors import Refused, describe
from ..protocol import Generation, JSONSchema, ResponseFormat
from ..service import Service, first_of, new_id
from ..tools import ToolChoice, tools_of
from .items import given, image_names, messages_of
from .protocol import AllowedTools, JSONSchemaFormat, NamedTool, ResponsesRequest
from .store import Record, Store
from .writer import Writer

# Fields that a Generation calls the same.
_SAME = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed"),
    *("stop", "min_tokens", "ignore_eos", "priority", "cache_salt", "user", "safety_identifier"),
)
_OUR_NAMES = {  # of a chat completion's fields
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
    "response_format": "text.format",
    "structured_outputs": "text.format",
    "reasoning_effort": "reasoning.effort",
}


class Run:
    """
    Attributes:
        record: what is told of it; whoever reads it later gets it from the store.
    """

    def __init__(
        self, service: Service, body: ResponsesRequest, store: Store, record: Record, conversation: Conversation
    ):
        self._tasks, self._store, self._conversation = service.tasks, store, conversation
        self.record = record
        self._stored = record.response["store"]
        self._writer = Writer(record.response, num_top=body.num_logprobs, emits=body.stream)

    @classmethod
    async def prepare(cls, service: Service, store: Store, body: ResponsesRequest, owner: bytes | None) -> Run:
        """Raises Refused and InvalidArgument for what is wrong with the request, but for what the engine finds."""
        adapter = service.adapter(body.model)
        _check(body, store)
        items = []
        if body.previous_response_id is not None:
            items = _turns(store.get(body.previous_response_id, owner, param="previous_response_id"))
        response = _begun(service, store, body) | {"model": adapter or service.model_name}
        record = Record(owner, response, [], [] if body.background and body.stream else None)
        try:
            record.items = items + await asyncio.to_thread(given, body.input)
            names = image_names(record.items, len(items))
            conversation = await Conversation.prepare(
                service,
                await asyncio.to_thread(messages_of, record.items, body.instructions),
                _generation(body),
                request_id=record.id,
                adapter=adapter,
                max_tokens=body.max_output_tokens,
                logprobs=body.num_logprobs,
                tools=tools_of(body.tools or ()),
                tool_choice=_choice(body),
                parallel_tool_calls=body.parallel_tool_calls,
                reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
                chat_template_kwargs=body.chat_template_kwargs,
                image_names=names,
            )
        except Exception as error:
            raise _renamed(error) from error
        return cls(service, body, store, record, conversation)

    async def whole(self) -> dict:
        """The finished response."""
        async with contextlib.aclosing(await self._steps()) as steps:
            async for _ in self._written(steps):
                pass
        return self.record.response

    async def events(self) -> AsyncIterator[bytes]:
        """What is streamed; the first step has come by then, so that what is wrong with the request has shown."""
        return self._written(await self._steps())

    def in_background(self) -> None:
        """Run in a task of its own, for which no client has to stay."""
        record = self.record
        record.response["status"] = "queued"
        self._keep(self._writer.created())
        self._store.add(record)
        # a context of its own: the request that began it is answered long before its end
        record.task = asyncio.get_running_loop().create_task(self._run_alone(), context=contextvars.Context())
        self._tasks.add(record.task)
        record.task.add_done_callback(self._tasks.discard)

    async def _steps(self) -> AsyncIterator[Step]:
        try:
            return await first_of(self._conversation.steps())
        except Exception as error:
            raise _renamed(error) from error

    async def _written(self, steps: AsyncIterator[Step]) -> AsyncIterator[bytes]:
        for event in self._writer.created() + self._writer.begin():
            yield event
        async with contextlib.aclosing(self._rest(steps)) as events:
            async for event in events:
                yield event

    async def _rest(self, steps: AsyncIterator[Step]) -> AsyncIterator[bytes]:
        """After the beginning. An error is the end of the response."""
        usage = self._conversation.usage
        try:
            async with contextlib.aclosing(steps):
                async for step in steps:
                    for event in self._writer.step(step):
                        yield event
            last = self._writer.end(usage)
        except Exception as error:
            last = self._writer.fail(describe(_renamed(error)), usage)
        self._ended()  # before its client is told, who may go on from it at once
        for event in last:
            yield event

    def _ended(self) -> None:
        if self._stored:
            self._store.settle(self.record)

    async def _run_alone(self) -> None:
        try:
            await asyncio.sleep(0)  # its creator is answered first
            self._keep(self._writer.begin())
            async with contextlib.aclosing(self._rest(self._conversation.steps())) as events:
                async for event in events:
                    self._keep([event])
        except asyncio.CancelledError:
            if self.record.running:
                self._keep(self._writer.cancel(self._conversation.usage))
                self._ended()
        finally:
            self.record.task = None
            self.record.tell()

    def _keep(self, events: list[bytes]) -> None:
        if self.record.events is not None:
            self.record.events += events
            self.record.tell()


def _check(body: ResponsesRequest, store: Store) -> None:
    if body.top_logprobs is not None and body.num_logprobs is None:
        message = "top_logprobs needs include: ['message.output_text.logprobs']"
        raise Refused(message, param="top_logprobs", code="invalid_value")
    if body.background and body.store is False:
        raise Refused("background needs store: true", param="background", code="invalid_value")
    if not store.keeps:
        for name in ("store", "background", "previous_response_id"):
            if getattr(body, name):
                raise Refused(f"{name}: this server keeps no responses", param=name, code="unsupported")


def _turns(record: Record) -> list[dict]:
    """All that was said up to the end of a response."""
    if record.running:
        message = f"previous_response_id: {record.id} has not come to its end yet"
        raise Refused(message, param="previous_response_id", code="invalid_value")
    return record.items + record.response["output"]


def _begun(service: Service, store: Store, body: ResponsesRequest) -> dict:
    """The response before anything came, in the form of openai's Response."""
    choice = body.tool_choice or "auto"
    text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text is not None else {}
    tools = [tool.model_dump() | {"strict": bool(tool.strict)} for tool in body.tools or ()]
    same = ("instructions", "max_output_tokens", "parallel_tool_calls", "previous_response_id", "background", "top_logprobs")
    told = ("prompt_cache_key", "safety_identifier", "user")
    return {
        "id": new_id(f"resp_{service.settings.response_tag}", ""),
        "object": "response",
        "created_at": time.time(),
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "output": [],
        "usage": None,
        "temperature": service.defaults["temperature"] if body.temperature is None else body.temperature,
        "top_p": service.defaults.get("top_p", 1.0) if body.top_p is None else body.top_p,
        "tools": tools,
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "text": {"format": {"type": "text"}, "verbosity": "medium"} | text,
        "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
        "truncation": "disabled",
        "service_tier": "default",
        "metadata": body.metadata or {},
        "store": store.keeps if body.store is None else body.store,
        **{name: getattr(body, name) for name in same},
        **{name: value for name in told if (value := getattr(body, name)) is not None},
    }


def _generation(body: ResponsesRequest) -> Generation:
    form = None if body.text is None else body.text.format
    asked = None
    if isinstance(form, JSONSchemaFormat):
        schema = JSONSchema(**form.model_dump(by_alias=True, exclude={"type"}))
        asked = ResponseFormat(type="json_schema", json_schema=schema)
    elif form is not None:
        asked = ResponseFormat(type=form.type)
    return Generation(response_format=asked, **{name: getattr(body, name) for name in _SAME})


def _choice(body: ResponsesRequest) -> ToolChoice:
    choice = body.tool_choice
    if isinstance(choice, NamedTool):
        return ToolChoice(mode="required", names=(choice.name,))
    if isinstance(choice, AllowedTools):
        return ToolChoice(mode=choice.mode, names=tuple(tool.name for tool in choice.tools))
    return ToolChoice(mode=choice or "auto")


def _renamed(error: Exception) -> Exception:
    """What is wrong with a request, said of the fields it has here."""
    said = describe(error)
    if said.param is None or said.status >= 500:
        return error
    head, _, rest = said.param.partition(".")
    name = ".".join(filter(None, (_OUR_NAMES.get(head, head), rest)))
    if head == "messages":
        name = "input"  # messages are not its items
    if head == "tools":
        name = name.replace(".function.", ".")
    if name == said.param:
        return error
    message = name + said.message.removeprefix(said.param) if said.message.startswith(said.param) else said.message
    return Refused(message, param=name, status=said.status, code=said.code)
