"""Images as users give them: decoded within limits, and put into prompts by the model's processor."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ..base.errors import InvalidArgument, UnsupportedOption
from ..base.images import ImageLimits
from ..runtime.media import Media, MediaModel
from .prompts import checked_ids

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_STILL = ("MPO",)  # cameras put a smaller version of the picture behind it


class Images:
    """Makes token ids and media of prompts with images.

    Args:
        processor: the model's; None if the engine has none.
        model: what the model does with images; None if it takes none.
        name: the model's.
    """

    def __init__(self, processor, model: MediaModel | None, limits: ImageLimits, name: str, vocab_size: int):
        self.processor, self._model, self._limits = processor, model, limits
        self._name, self._vocab_size = name, vocab_size
        self._most_values = 4 * limits.max_total_pixels  # three colours, and a mask

    def check(self) -> None:
        """Raise UnsupportedOption unless the model takes images here."""
        if self._model is None:
            raise UnsupportedOption(f"images: {self._name} takes none, or they are not run (docs/vision.md), as on several ranks")

    def check_none(self, ids: list[int]) -> None:
        """Raise InvalidArgument if a text that came without images has placeholders for some."""
        if self.processor is not None and self._model is not None and self._model.token_id in ids:
            raise InvalidArgument("images: the prompt has placeholders for images, and there are none")

    def of_ids(self, ids: list[int], images) -> Media:
        """The media of a prompt given as token ids, with what a processor made of its images.

        Raises InvalidArgument if they do not go together.
        """
        self.check()
        if not isinstance(images, Mapping):
            raise InvalidArgument(
                "images: beside a prompt of token ids they are the processor's own outputs (a mapping with pixel_values and "
                f"the like), got {type(images).__name__}"
            )
        try:
            media = self._model.read(ids, images)
        except InvalidArgument:
            raise
        except Exception as error:  # tensors of wrong shapes or kinds
            raise InvalidArgument(f"images: these are no outputs of this model's processor: {error}") from error
        size, most = sum(value.numel() for item in media.items.values() for value in item.inputs.values()), self._most_values
        if size > most:
            raise InvalidArgument(f"images: {size} values exceed {most}, which max_total_pixels have")
        return media

    def of_text(self, text: str, images, *, add_special_tokens: bool) -> tuple[list[int], Media]:
        """(token ids, media) of a text with placeholders for as many images, as the model's processor makes them.

        Args:
            images: PIL images, arrays or encoded bytes, in the order of their placeholders.

        Raises InvalidArgument for an image that cannot be decoded or exceeds a limit, or a wrong number of them.
        """
        self.check()
        if self.processor is None:
            raise InvalidArgument("images: the engine has no processor; give it the model's processor as its tokenizer")
        pictures = self._decoded(images)
        self._check_places(text, len(pictures))
        try:
            made = self.processor(
                text=[text], images=pictures, add_special_tokens=add_special_tokens, return_tensors="pt"
            )
        except Exception as error:  # whatever a processor raises on what it does not like
            raise InvalidArgument(f"images: the processor refused the prompt with its images: {error}") from error
        ids = checked_ids(made.pop("input_ids")[0], self._vocab_size)
        return ids, self.of_ids(ids, made)

    def _check_places(self, text: str, count: int) -> None:
        """Raise InvalidArgument unless the text has a place for each of so many images, and nothing that looks like one."""
        marker = getattr(self.processor, "boi_token", None) or getattr(self.processor, "image_token", None)
        if not isinstance(marker, str):
            return
        if text.count(marker) != count:
            raise InvalidArgument(
                f"images: there are {count} of them, and the prompt has {text.count(marker)} places ({marker}) for some"
            )
        token = self.processor.tokenizer.convert_ids_to_tokens(self._model.token_id)
        if token != marker and token in text:
            raise InvalidArgument(f"images: the prompt has {token} of its own; an image's place is {marker}")

    def _decoded(self, images) -> list:
        if isinstance(images, Mapping | str | bytes) or not isinstance(images, Sequence):
            raise InvalidArgument(f"images must be a list of images, got {type(images).__name__}")
        if len(images) > self._limits.max_count:
            raise InvalidArgument(f"images: {len(images)} of them exceed max_count ({self._limits.max_count})")
        readers = [_reader(image, place, self._limits) for place, image in enumerate(images)]
        total = 0
        for reader in readers:
            total += reader.width * reader.height
            if total > self._limits.max_total_pixels:
                most = self._limits.max_total_pixels
                raise InvalidArgument(f"{reader.name}: with it the images have {total} pixels, more than max_total_pixels ({most})")
        pictures = []
        while readers:  # each file is let go before the next one is decoded
            pictures.append(readers.pop(0).read())
        return pictures


class _Reader(NamedTuple):
    """An image whose size is known, and that is not decoded yet."""

    name: str
    width: int
    height: int
    decode: Callable[[], object]

    def read(self):
        """What the processor is given. Raises InvalidArgument for an image that is damaged."""
        return _tried(self.decode, self.name)


def _reader(image, place: int, limits: ImageLimits) -> _Reader:
    """Of PIL images and arrays, which stay as they are, and of encoded bytes, which become an RGB image, upright.

    Raises InvalidArgument, naming its place in `images`, for what is no image or exceeds a limit.
    """
    name = f"images[{place}]"
    if isinstance(image, bytes | bytearray | memoryview):
        reader = _opened(bytes(image), name, limits)
    elif hasattr(image, "load") and isinstance(getattr(image, "size", None), tuple):  # PIL
        reader = _Reader(name, *image.size, lambda: _loaded(image))
    else:
        shape = tuple(getattr(image, "shape", ()))
        if not hasattr(image, "__array__") or len(shape) not in (2, 3) or 0 in shape:
            raise InvalidArgument(
                f"{name} must be a PIL image, an array [H, W, C] or encoded bytes, got {_kind(image, shape)}"
            )
        reader = _Reader(name, *sorted(shape)[-2:], lambda: image)
    _check_size(reader, limits)
    return reader


def _kind(image, shape: tuple) -> str:
    return f"{type(image).__name__} of shape {list(shape)}" if shape else type(image).__name__


def _opened(data: bytes, name: str, limits: ImageLimits) -> _Reader:
    """The first and only frame of an encoded image. Nothing is decoded."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UnsupportedOption("images: encoded images need Pillow; pip install 'hf_paged[vision]'") from error
    Image.init()  # or it knows some formats only later
    if len(data) > limits.max_bytes:
        raise InvalidArgument(f"{name} has {len(data)} bytes, more than max_bytes ({limits.max_bytes})")
    image = _tried(lambda: Image.open(io.BytesIO(data), formats=FORMATS), name)

    def decode():
        if image.format not in _STILL and getattr(image, "is_animated", False):
            raise InvalidArgument(f"{name} is animated; give one frame")
        return ImageOps.exif_transpose(image).convert("RGB")

    return _Reader(name, *image.size, decode)


def _loaded(image):
    image.load()  # a file that is damaged shows here
    return image


def _tried(read: Callable[[], object], name: str):
    try:
        return read()
    except InvalidArgument:
        raise
    except Exception as error:  # damaged files make Pillow raise all kinds
        raise InvalidArgument(f"{name} cannot be decoded: {error}") from error


def _check_size(image: _Reader, limits: ImageLimits) -> None:
    width, height, size = image.width, image.height, f"{image.name} has {image.width} x {image.height} pixels"
    if width < 1 or height < 1:
        raise InvalidArgument(f"{image.name} has no pixels")
    if width * height > limits.max_pixels:
        raise InvalidArgument(f"{size}, more than max_pixels ({limits.max_pixels})")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise InvalidArgument(f"{size}, and one side is more than {limits.max_aspect} times the other (max_aspect)")


def has_images(messages: list[dict]) -> bool:
    """Whether chat messages have parts that are images."""
    contents = (message.get("content") for message in messages if isinstance(message, dict))
    parts = (part for content in contents if isinstance(content, list | tuple) for part in content)
    return any(isinstance(part, dict) and part.get("type") == "image" for part in parts)


def images_of_messages(messages: list[dict], images) -> tuple[list[dict], list | None]:
    """(messages whose image parts are plain placeholders, the images in order) of chat messages.

    Images may be given beside the messages, or in the parts ({"type": "image", "image": ...}).

    Raises InvalidArgument for parts that name an image by an address, and for images given both ways; UnsupportedOption for
    parts of other kinds, such as videos.
    """
    inside, plain, parts = [], [], 0
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, list | tuple):
            plain.append(message)
            continue
        cleaned = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image":
                parts += 1
                inside += _given(part)
                cleaned.append({"type": "image"})
            elif kind == "text":
                cleaned.append(part)
            else:
                raise UnsupportedOption(
                    f"prompt: a part of type {kind!r} is not supported; there are 'text' and 'image'"
                )
        plain.append({**message, "content": cleaned})
    if inside and (images or len(inside) != parts):
        raise InvalidArgument("images: give them all in `images`, or all in the parts of the messages")
    found = inside if inside else images
    if parts and not found:
        raise InvalidArgument(f"images: the messages have {parts} image parts, and there are no images")
    return plain, found


def _given(part: dict) -> list:
    others = set(part) - {"type", "image"}
    if others or isinstance(part.get("image"), str):
        what = sorted(others)[0] if others else "image"
        raise InvalidArgument(
            f"prompt: an image part has {what!r}; give the image itself as 'image', or in `images`: nothing is fetched"
        )
    return [part["image"]] if part.get("image") is not None else []
