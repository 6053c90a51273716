"""From messages to the tokens of a prompt, by the model's chat template."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from jinja2 import TemplateError, meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from ...runtime.media import NO_MEDIA, Media
from .errors import Refused
from .images import named_images, parts_of, reads_parts
from .protocol import Message
from .service import Service
from .tools import Tool

# What templates are called with, and the call itself is told.
_RESERVED = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"} - {"self", "kwargs"}
_GENERATION = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")  # transformers' own tag


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads.

    Attributes:
        text: with a placeholder for each image.
        token_ids: with as many for each image as it has tokens.
        continued: the beginning of the answer, if it ends with one.
        media: the images.
    """

    text: str
    token_ids: list[int]
    continued: str | None = None
    media: Media = NO_MEDIA


async def chat_prompt(
    service: Service, messages: Sequence[Message], *, image_names: Sequence[str] | None = None, **options
) -> Prompt:
    """What the model's chat template makes of a conversation, with its images.

    Args:
        image_names: of the fields that the images are in; None: those of a chat completion's messages.
        options: `_rendered`'s.

    Raises Refused, naming the field at fault.
    """
    named = named_images(messages, image_names, service.images is not None)
    prompt = await asyncio.to_thread(_rendered, service, messages, bool(named), **options)
    if not named:
        if service.images is not None and service.images.token_id in prompt.token_ids:
            message = "messages: they have placeholders for images, and there are none"
            raise Refused(message, param="messages", code="invalid_image")
        return prompt
    token_ids, media = await service.images.put(prompt.text, named)
    return replace(prompt, token_ids=token_ids, media=media)


def _rendered(
    service: Service,
    messages: Sequence[Message],
    images: bool,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    chat_template: str | None = None,
    chat_template_kwargs: dict | None = None,
    documents: list[dict] | None = None,
    tools: Sequence[Tool] = (),
    reasoning_effort: str | None = None,
) -> Prompt:
    """Runs the template, which may take a while. With `images` the token ids are left out."""
    options = dict(chat_template_kwargs or {})
    _check_asked(service, messages, chat_template, options)
    parts = service.images is not None and reads_parts(service.tokenizer)
    if images and not parts:
        raise Refused("messages: this model's chat template knows no images", param="messages", code="unsupported")
    plain = _plain_messages(messages, parts)
    listed = [tool.for_template() for tool in tools] or None
    if reasoning_effort is not None:
        if options.get("reasoning_effort", reasoning_effort) != reasoning_effort:
            message = "reasoning_effort and chat_template_kwargs.reasoning_effort differ"
            raise Refused(message, param="reasoning_effort", code="invalid_value")
        options["reasoning_effort"] = reasoning_effort
    options |= {
        "add_generation_prompt": add_generation_prompt and not continue_final_message,
        "continue_final_message": continue_final_message,
        "documents": documents,
        "tools": listed,
    }
    must_read = [name for name, given in (("tools", listed), ("reasoning_effort", reasoning_effort)) if given]
    try:
        if chat_template is not None:
            text = _sandboxed(service, chat_template, plain, options, must_read)
        else:
            _check_known(_variables(service.tokenizer.get_chat_template(None, listed)), must_read)
            text = service.tokenizer.apply_chat_template(plain, tokenize=False, **options)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise Refused(f"messages: the chat template refuses them: {error}", param="messages", code="template") from error
    service.check_length("messages", text)
    ids = [] if images else service.tokenizer(text, add_special_tokens=False).input_ids
    return Prompt(text, ids, messages[-1].text if continue_final_message else None)


def _check_asked(service: Service, messages: Sequence[Message], chat_template: str | None, options: dict) -> None:
    limit = service.settings.limits.messages
    if len(messages) > limit:
        raise Refused(f"messages: {len(messages)} are more than the {limit} allowed", param="messages", code="too_many")
    if chat_template is not None and not service.settings.request_chat_templates:
        raise Refused("chat_template: this server takes none from requests", param="chat_template", code="not_allowed")
    if chat_template is None and not getattr(service.tokenizer, "chat_template", None):
        raise Refused("messages: this model has no chat template", param="messages", code="no_chat_template")
    reserved = options.keys() & _RESERVED
    if reserved:
        name = f"chat_template_kwargs.{min(reserved)}"
        raise Refused(f"{name} is not the template's", param=name, code="not_allowed")


def _sandboxed(service: Service, chat_template: str, plain: list[dict], options: dict, must_read: list[str]) -> str:
    """By a template of the request's own, which is not trusted."""
    arguments = {**service.tokenizer.special_tokens_map, **options}
    most = service.max_model_len * service.settings.limits.characters_per_token
    return service.sandbox.render(chat_template, must_read=must_read, most=most, conversations=[plain], **arguments)


@lru_cache(maxsize=16)
def _variables(template: str) -> frozenset[str]:
    """What a template reads of what it is given."""
    environment = ImmutableSandboxedEnvironment(extensions=[loopcontrols])
    return frozenset(meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", template))))


def _check_known(known: frozenset[str], must_read: list[str]) -> None:
    """What a template does not read would be ignored without a word."""
    for name in must_read:
        if name not in known:
            raise Refused(f"{name}: this model's chat template does not know it", param=name, code="unsupported")


def _plain_messages(messages: Sequence[Message], parts: bool) -> list[dict]:
    """Messages as templates read them: text in one string, arguments as objects, results with their functions' names.

    With `parts` contents are lists of texts and images.
    """
    names: dict[str, str] = {}  # of the calls so far, by id
    return [_plain(message, f"messages.{place}", names, parts) for place, message in enumerate(messages)]


def _plain(message: Message, place: str, names: dict[str, str], parts: bool) -> dict:
    plain = message.model_dump(exclude_none=True, exclude={"reasoning", "reasoning_content", "tool_calls"})
    plain["content"] = parts_of(message) if parts else message.text
    if plain["role"] == "developer":
        plain["role"] = "system"
    for field in ("tool_calls", "reasoning", "reasoning_content"):
        if getattr(message, field) and message.role != "assistant":
            raise Refused(f"{place}.{field} is the assistant's", param=f"{place}.{field}", code="invalid_value")
    if message.reasoning or message.reasoning_content:
        if message.reasoning and message.reasoning_content not in (None, message.reasoning):
            name = f"{place}.reasoning"
            raise Refused(f"{name} and reasoning_content differ", param=name, code="invalid_value")
        reasoning = message.reasoning or message.reasoning_content
        # templates have three names for it
        plain |= {"reasoning": reasoning, "reasoning_content": reasoning, "thinking": reasoning}
    if message.tool_calls:
        plain["tool_calls"] = [
            _plain_call(call, f"{place}.tool_calls.{index}", names) for index, call in enumerate(message.tool_calls)
        ]
    _check_result(message, place, names)
    if message.role == "tool" and message.name is None:
        plain["name"] = names[message.tool_call_id]
    return plain


def _plain_call(call, place: str, names: dict[str, str]) -> dict:
    function = call.function
    try:
        arguments = json.loads(function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        name = f"{place}.function.arguments"
        raise Refused(f"{name} is not the JSON text of an object", param=name, code="invalid_value")
    if call.id is not None:
        names[call.id] = function.name
    identity = {} if call.id is None else {"id": call.id}
    return {**identity, "type": "function", "function": {"name": function.name, "arguments": arguments}}


def _check_result(message: Message, place: str, names: dict[str, str]) -> None:
    """A tool's message is the result of an earlier call."""
    name = f"{place}.tool_call_id"
    if message.role != "tool":
        if message.tool_call_id is not None:
            raise Refused(f"{name} is a tool's", param=name, code="invalid_value")
    elif message.tool_call_id is None:
        raise Refused(f"{name} is missing", param=name, code="missing")
    elif message.tool_call_id not in names:
        raise Refused(f"{name}: no call before it has this id", param=name, code="invalid_value")
