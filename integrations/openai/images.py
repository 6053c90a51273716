"""Images in conversations: whose they may be, how chat templates read them, and how they become part of a prompt."""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import Sequence

from ...base.errors import InvalidArgument
from ...engine.engine import BatchEngine
from ...runtime.media import Media
from .errors import Refused
from .media import MediaReader
from .protocol import ImagePart, Message, TextPart
from .settings import Settings

AT_ONCE = 4  # requests whose images are decoded and cut up: each may take much memory for a moment
_PROBE = "a text that no template has"
_PLACE = re.compile(r"images\[(\d+)\]")


class Images:
    """What a server of a model that takes images does with those of its requests."""

    def __init__(self, engine: BatchEngine, settings: Settings):
        self._engine = engine
        self.token_id = engine.model.media.token_id  # of the placeholders
        self._turn = asyncio.Semaphore(AT_ONCE)
        self.reader = MediaReader(
            settings.allowed_media_hosts,
            most_images=engine.config.images.max_count,
            most_bytes=settings.limits.image_bytes,
            timeout=settings.media_timeout,
        )

    async def put(self, text: str, urls: Sequence[tuple[str, str]]) -> tuple[list[int], Media]:
        """Token ids and images of a text that the chat template made, with a placeholder for each image.

        Args:
            urls: of the images, each with the name of the field it is in.

        Raises Refused, naming the field of the image that is at fault.
        """
        encoded = await self.reader.read(urls)
        async with self._turn:
            try:
                return await asyncio.to_thread(self._engine.read_images, text, encoded, add_special_tokens=False)
            except InvalidArgument as error:
                raise _blamed(error, [name for name, _ in urls]) from error


def takes_images(engine: BatchEngine) -> bool:
    return engine.processor is not None and engine.model.media is not None


def _blamed(error: InvalidArgument, names: Sequence[str]) -> Refused:
    """An engine's complaint about `images`, said of the request's fields."""
    message = str(error)
    place = _PLACE.match(message)
    name = "messages" if place is None else names[int(place[1])]
    said = message.removeprefix("images:").strip() if place is None else message[place.end() :].lstrip(": ")
    return Refused(f"{name}: {said}", param=name, code="invalid_image")


def named_images(messages: Sequence[Message], names: Sequence[str] | None, taken: bool) -> list[tuple[str, str]]:
    """(field, URL) of the images of a conversation, in order.

    Args:
        names: of the fields; None: those of a chat completion's messages.
        taken: whether the model takes images.

    Raises Refused, naming the field, for one that is not the user's, and for any unless they are `taken`.
    """
    found = []
    for place, message in enumerate(messages):
        for index, part in message.images.items():
            name = f"messages.{place}.content.{index}.image_url" if names is None else names[len(found)]
            if message.role != "user":
                raise Refused(f"{name}: images are the user's", param=name, code="invalid_value")
            if not taken:
                raise Refused(f"{name}: this model takes no images", param=name, code="unsupported")
            found.append((name, part.image_url.url))
    return found


def parts_of(message: Message) -> list[dict]:
    """The content as templates of models that take images read it."""
    if isinstance(message.content, str) or not message.content:
        return [{"type": "text", "text": message.text}]
    return [
        {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
        for part in message.content
        if isinstance(part, TextPart | ImagePart)
    ]


def reads_parts(tokenizer) -> bool:
    """Whether the tokenizer's chat template reads contents as lists of texts and images, tried with one of each."""
    text = {"type": "text", "text": _PROBE}
    try:
        alone, beside = (
            tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
            for content in ([text], [{"type": "image"}, text])
        )
    except Exception:  # whatever a template raises on contents it does not know
        return False
    return _PROBE in alone and _PROBE in beside and "'text'" not in alone and alone != beside


def with_images(tokenizer, processor):
    """The tokenizer, with the chat template of the processor if its own knows no images."""
    template = getattr(processor, "chat_template", None)
    if reads_parts(tokenizer) or not isinstance(template, str):
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer
