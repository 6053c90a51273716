"""From an answer's steps to a response and the events that tell how it came about."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fastapi.sse import format_sse_event
from pydantic_core import to_json

from ..conversation import Step
from ..errors import Refused, body_of
from ..logprobs import chat_logprobs
from ..pieces import CallArguments, CallBegins, Content, Finished, Reasoning
from ..service import Usage, new_id

_CODES = {429: "rate_limit_exceeded", 400: "invalid_prompt"}


@dataclass
class _Open:
    """The item that is being written. Its text is put together at its end: adding to it each time copies all of it."""

    item: dict
    parts: list[str] = field(default_factory=list)
    logprobs: list[dict] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return self.item["type"]


class Writer:
    """Writes one response.

    Every method returns the events of what it did, ready to be sent; none if `emits` is false.

    Args:
        response: without output and usage, which are filled in here.
        num_top: how many most likely tokens to tell beside each; None: tell nothing.
    """

    def __init__(self, response: dict, *, num_top: int | None, emits: bool):
        self.response = response
        self._num_top, self._emits = num_top, emits
        self._sequence = 0
        self._open: _Open | None = None
        self._untold: list[dict] = []  # log-probabilities of tokens whose text is yet to come

    def created(self) -> list[bytes]:
        events = self._events("response.created", response=self.response)
        if self.response["status"] == "queued":
            events += self._events("response.queued", response=self.response)
        return events

    def begin(self) -> list[bytes]:
        self.response["status"] = "in_progress"
        return self._events("response.in_progress", response=self.response)

    def step(self, step: Step) -> list[bytes]:
        events: list[bytes] = []
        if self._num_top is not None:
            self._untold += chat_logprobs(step.token_ids, step.logprobs or [], self._num_top)["content"]
        for piece in step.pieces:
            match piece:
                case Content(text):
                    events += self._text("message", text)
                case Reasoning(text):
                    events += self._text("reasoning", text)
                case CallBegins(_, id, name):
                    events += self._call(id, name)
                case CallArguments(_, text):
                    self._open.parts.append(text)
                    events += self._at_item("response.function_call_arguments.delta", delta=text)
                case Finished():
                    events += self._finish(piece)
        if step.pieces and not any(isinstance(piece, Content) for piece in step.pieces):
            self._untold = []  # they made no text of a message
        return events

    def end(self, usage: Usage) -> list[bytes]:
        """After the last step."""
        self._use(usage)
        return self._events(f"response.{self.response['status']}", response=self.response)

    def fail(self, error: Refused, usage: Usage) -> list[bytes]:
        """What was written so far stays."""
        said = body_of(error)["error"]
        events = self._close("incomplete")
        self._use(usage)
        code = _CODES.get(error.status, "server_error")
        self.response |= {"status": "failed", "error": {"code": code, "message": said["message"]}}
        return events + self._events("response.failed", response=self.response)

    def cancel(self, usage: Usage) -> list[bytes]:
        """There is no event for it: streams just end."""
        events = self._close("incomplete")
        self._use(usage)
        self.response["status"] = "cancelled"
        return events

    def _use(self, usage: Usage) -> None:
        counts = usage.as_dict()
        cached = counts["prompt_tokens_details"]["cached_tokens"]
        reasoning = counts.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
        self.response["usage"] = {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": reasoning},
            "total_tokens": counts["total_tokens"],
        }

    def _finish(self, finished: Finished) -> list[bytes]:
        cut = finished.reason in ("length", "abort")
        opened = [] if self.response["output"] else self._text("message", "")
        if self._open is not None and self._open.kind == "message":
            self._open.logprobs += self._untold  # of a token that ended it and has no text
        events = opened + self._close("incomplete" if cut else "completed")
        if finished.reason == "abort":
            self.response["status"] = "cancelled"
        elif finished.reason == "length":
            self.response |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        else:
            self.response |= {"status": "completed", "completed_at": time.time()}
        return events

    def _text(self, kind: str, text: str) -> list[bytes]:
        """More of a message, or of what was thought before it."""
        events: list[bytes] = []
        if self._open is None or self._open.kind != kind:
            events += self._close("completed") + self._open_text(kind)
            if kind == "message":
                self._untold = _without_marks(self._untold, text)
        self._open.parts.append(text)
        if kind == "reasoning":
            return events + self._at_item("response.reasoning_text.delta", content_index=0, delta=text)
        told, self._untold = self._untold, []
        self._open.logprobs += told
        if not text:
            return events
        return events + self._at_item("response.output_text.delta", content_index=0, delta=text, logprobs=told)

    def _open_text(self, kind: str) -> list[bytes]:
        if kind == "message":
            item = {"id": new_id("msg", "_"), "type": kind, "role": "assistant", "status": "in_progress", "content": []}
        else:
            item = {"id": new_id("rs", "_"), "type": kind, "status": "in_progress", "summary": [], "content": []}
        events = self._opened(item)
        return events + self._at_item("response.content_part.added", content_index=0, part=self._part(""))

    def _call(self, id: str, name: str) -> list[bytes]:
        events = self._close("completed")
        item = {"id": new_id("fc", "_"), "type": "function_call", "status": "in_progress"}
        return events + self._opened(item | {"call_id": id, "name": name, "arguments": ""})

    def _opened(self, item: dict) -> list[bytes]:
        self._open = _Open(item)
        self.response["output"].append(item)
        return self._events("response.output_item.added", output_index=self._place, item=item)

    def _part(self, text: str) -> dict:
        if self._open.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        part = {"type": "output_text", "text": text, "annotations": []}
        return part if self._num_top is None else part | {"logprobs": self._open.logprobs}

    def _close(self, status: str) -> list[bytes]:
        """The open item is whole, or as whole as it will be."""
        opened = self._open
        if opened is None:
            return []
        text = "".join(opened.parts)
        if opened.kind == "function_call":
            opened.item["arguments"] = text
            events = self._at_item("response.function_call_arguments.done", arguments=text)
        else:
            part = self._part(text)
            opened.item["content"] = [part]
            more = {"logprobs": opened.logprobs} if opened.kind == "message" else {}
            kind = "output_text" if opened.kind == "message" else "reasoning_text"
            events = self._at_item(f"response.{kind}.done", content_index=0, text=text, **more)
            events += self._at_item("response.content_part.done", content_index=0, part=part)
        opened.item["status"] = status
        events += self._events("response.output_item.done", output_index=self._place, item=opened.item)
        self._open = None
        return events

    @property
    def _place(self) -> int:
        return len(self.response["output"]) - 1

    def _at_item(self, kind: str, **fields) -> list[bytes]:
        return self._events(kind, item_id=self._open.item["id"], output_index=self._place, **fields)

    def _events(self, kind: str, **fields) -> list[bytes]:
        if not self._emits:
            return []
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return [format_sse_event(event=kind, data_str=to_json(event, inf_nan_mode="null").decode())]


def _without_marks(entries: list[dict], text: str) -> list[dict]:
    """Of the tokens before and of a message's first text, those of its text: the others were marks around it."""
    texts = [entry["token"] for entry in entries]
    if any("\ufffd" in token for token in texts):
        return entries  # parts of a character: their lengths say nothing
    place, length = len(texts), 0
    while place and length < len(text):
        place -= 1
        length += len(texts[place])
    return entries[place:] if length >= len(text) else entries
