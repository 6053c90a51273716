"""What images a request may bring, and what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from .errors import InvalidArgument
from .sizes import parse_bytes


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """Limits on images (`EngineConfig.images`). Whatever exceeds one is refused when the request is added.

    Attributes:
        max_count: most images of one prompt.
        max_pixels: most pixels of an image, looked up in its header before anything is decoded.
        max_total_pixels: of all images of a prompt, which are in memory together while the processor reads them; None: four
            times max_pixels.
        max_aspect: most times that an image may be longer than wide, or wider than long. Processors that bring the shorter
            side to a length make the longer one as much longer.
        max_bytes: most bytes of an image that comes encoded (PNG, JPEG, ...), as an int or a string such as "20MiB".
        tokens_per_step: most placeholder tokens whose embeddings one step has encoded. A larger image takes a step of its
            own.
        cache_memory: most bytes of embeddings that are kept on the model's device, for further prompts with the same
            image; as an int or a string.
        queue_memory: most bytes that the images of all requests which have not ended take on the host, as the processor made
            them; more requests raise `QueueFull`, as with `max_queue`. As an int or a string; None: unbounded.

    Raises InvalidArgument for a value that is none of these.
    """

    max_count: int = 16
    max_pixels: int = 1 << 25
    max_total_pixels: int | None = None
    max_aspect: int = 200
    max_bytes: int | str = 20 << 20
    tokens_per_step: int = 4096
    cache_memory: int | str = 256 << 20
    queue_memory: int | str | None = None

    def __post_init__(self):
        for name in ("max_bytes", "cache_memory", "queue_memory"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, parse_bytes(f"images: {name}", getattr(self, name)))
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name == "max_total_pixels":
                value = 4 * self.max_pixels
                object.__setattr__(self, field.name, value)
            if value is None and field.name == "queue_memory":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidArgument(f"images: {field.name} must be a positive integer, got {value!r}")
