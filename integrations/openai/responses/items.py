"""Items: what a conversation is made of here, and the messages that chat templates know instead."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import Refused
from ..protocol import FunctionCall as CalledFunction
from ..protocol import ImagePart, ImageURL, Message, TextPart, ToolCall
from ..service import new_id
from .protocol import InputMessage, Item, ReasoningItem

_KINDS = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def given(items: str | Sequence[Item]) -> list[dict]:
    """A request's input in the form it is kept, with an id for every item.

    Raises Refused for an image that is not the user's.
    """
    if isinstance(items, str):
        items = [InputMessage(role="user", content=items)]
    return [_kept(item, f"input.{place}") for place, item in enumerate(items)]


def _kept(item: Item, place: str) -> dict:
    kept = item.model_dump(exclude_none=True)
    kept.setdefault("id", new_id(_KINDS[item.type], "_"))
    kept.setdefault("status", "completed")
    if isinstance(item, ReasoningItem):
        return kept
    if isinstance(item, InputMessage):
        kind = "output_text" if item.role == "assistant" else "input_text"
        if isinstance(item.content, str):
            kept["content"] = [{"type": kind, "text": item.content}]
        for index, part in enumerate(kept["content"]):
            if part["type"] == "input_image":
                if item.role != "user":
                    name = f"{place}.content.{index}.image_url"
                    raise Refused(f"{name}: images are the user's", param=name, code="invalid_value")
                continue
            part["type"] = kind
            part.pop("logprobs", None)
            if kind == "output_text":
                part.setdefault("annotations", [])
    return kept


def messages_of(items: Sequence[dict], instructions: str | None) -> list[Message]:
    """Kept items as messages, after the instructions.

    What the assistant thinks, says and calls one after the other is one message of its: so its template wrote it.
    """
    messages = [] if instructions is None else [Message(role="system", content=instructions)]
    said: list[dict] = []
    for item in items:
        if item["type"] in ("function_call", "reasoning") or item.get("role") == "assistant":
            if said and item["type"] == "reasoning":  # thinking begins a message
                messages.append(_assistant(said))
                said = []
            said.append(item)
            continue
        if said:
            messages.append(_assistant(said))
            said = []
        messages.append(_other(item))
    return [*messages, _assistant(said)] if said else messages


def image_names(items: Sequence[dict], num_earlier: int) -> list[str]:
    """The fields that the images of kept items are in, in order; those of the first `num_earlier` are an earlier response's."""
    return [
        f"input.{place - num_earlier}.content.{index}.image_url" if place >= num_earlier else "previous_response_id"
        for place, item in enumerate(items)
        if item["type"] == "message"
        for index, part in enumerate(item["content"])
        if part["type"] == "input_image"
    ]


def _assistant(items: list[dict]) -> Message:
    text, reasoning, calls = [], [], []
    for item in items:
        if item["type"] == "function_call":
            function = CalledFunction(name=item["name"], arguments=item["arguments"])
            calls.append(ToolCall(id=item["call_id"], function=function))
        else:
            (reasoning if item["type"] == "reasoning" else text).extend(part["text"] for part in item.get("content", ()))
    return Message(
        role="assistant",
        content="".join(text) if text or not calls else None,
        reasoning_content="".join(reasoning) or None,
        tool_calls=calls or None,
    )


def _other(item: dict) -> Message:
    if item["type"] == "function_call_output":
        output = item["output"]
        text = output if isinstance(output, str) else "".join(part["text"] for part in output)
        return Message(role="tool", tool_call_id=item["call_id"], content=text)
    return Message(role=item["role"], content=[_part(part) for part in item["content"]])


def _part(part: dict) -> TextPart | ImagePart:
    if part["type"] == "input_image":
        return ImagePart(type="image_url", image_url=ImageURL(url=part["image_url"], detail=part["detail"]))
    return TextPart(type="text", text=part["text"])
