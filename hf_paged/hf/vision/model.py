"""The engine's view of a transformers model that takes images (`runtime.media.MediaModel`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ...base.errors import InvalidArgument
from ...core.request import MediaSpan
from ...runtime.media import Media, MediaItem
from ..swap import evaluating
from .families import FAMILIES, Family, features
from .positions import counts_images, prompt_positions, shifts_of

# What processors return beside images, and what is in the prompt already.
OF_THE_PROMPT = frozenset("input_ids attention_mask token_type_ids mm_token_type_ids".split())


class TransformersImages:
    """Implements `runtime.media.MediaModel` for a model of one of the families."""

    def __init__(self, model: torch.nn.Module, family: Family):
        self.model = model
        self.family = family
        self.shifts_positions = counts_images(model)

    @property
    def token_id(self) -> int:
        """The placeholder's."""
        return self.model.config.image_token_id

    def read(self, token_ids: list[int], inputs: Mapping[str, object]) -> Media:
        """See `MediaModel`."""
        places = [place for place, token in enumerate(token_ids) if token == self.token_id]
        parts = self.family.split(self.model, self._tensors(inputs))
        lengths = self._lengths(parts, len(places))
        if sum(lengths) != len(places):
            raise InvalidArgument(
                f"images: the prompt has {len(places)} placeholder tokens, and the images stand for {sum(lengths)}"
            )
        spans: list[MediaSpan] = []
        items: dict[bytes, MediaItem] = {}
        start = 0
        for part, length in zip(parts, lengths, strict=True):
            item = MediaItem(content_key(part), length, part)
            items[item.key] = item
            spans += spans_of(item.key, places[start : start + length], self.family.bidirectional)
            start += length
        shifts = None
        if self.shifts_positions and parts:
            grids = torch.cat([part["image_grid_thw"] for part in parts])
            shifts = shifts_of(prompt_positions(self.model, token_ids, self.token_id, grids))
        return Media(tuple(spans), items, shifts)

    def _tensors(self, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        names = self.family.names
        unknown = sorted(name for name in inputs if name not in names and name not in OF_THE_PROMPT)
        if unknown:
            raise InvalidArgument(
                f"images: {type(self.model).__name__} takes no {unknown[0]!r}; it takes {', '.join(names)}"
            )
        if names[0] not in inputs:
            raise InvalidArgument(f"images: the processor's outputs have no {names[0]!r}")
        found = {name: torch.as_tensor(inputs[name]).cpu() for name in names if name in inputs}
        if not bool(torch.isfinite(found[names[0]]).all()):
            raise InvalidArgument(f"images: {names[0]} has values that are no numbers")
        return found

    def _lengths(self, parts: list, num_places: int) -> list[int]:
        if not parts:
            return []
        lengths = None if self.family.lengths is None else self.family.lengths(self.model, parts)
        if lengths is not None:
            return lengths
        length, rest = divmod(num_places, len(parts))
        if rest or not length:
            raise InvalidArgument(
                f"images: the prompt has {num_places} placeholder tokens for {len(parts)} images (or tiles) of the same size"
            )
        return [length] * len(parts)

    def encode(self, items: Sequence[MediaItem]) -> list[Tensor]:
        """See `MediaModel`. Items of the same shapes are encoded together."""
        groups: dict[tuple, list[MediaItem]] = {}
        for item in items:
            shapes = tuple((name, tuple(value.shape)) for name, value in item.inputs.items())
            groups.setdefault((item.num_tokens, *shapes), []).append(item)
        found: dict[bytes, Tensor] = {}
        for (num_tokens, *_), group in groups.items():
            device, dtype = self.model.device, self.model.get_input_embeddings().weight.dtype
            joined = {
                name: value.to(device) for name, value in self.family.join([item.inputs for item in group]).items()
            }
            with evaluating(self.model):
                output = features(self.model, joined).to(dtype)
            if len(output) != num_tokens * len(group):
                raise ValueError(f"the encoder gave {len(output)} embeddings for {num_tokens * len(group)} tokens")
            found |= {item.key: own.clone() for item, own in zip(group, output.split(num_tokens))}
        return [found[item.key] for item in items]


def images_of(model: torch.nn.Module) -> TransformersImages | None:
    """None for a model that takes no images, or not as one of the families does."""
    family = FAMILIES.get(getattr(model.config, "model_type", None))
    if family is None or not hasattr(model.base_model, "get_image_features"):
        return None
    return TransformersImages(model, family)


def content_key(inputs: Mapping[str, Tensor]) -> bytes:
    """SHA-256 of tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, value in sorted(inputs.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\0".encode())
        digest.update(value.contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.digest()


def spans_of(key: bytes, places: Sequence[int], bidirectional: bool) -> Iterator[MediaSpan]:
    """The runs of placeholders at `places` that stand for one item."""
    begin = 0
    for index in range(1, len(places) + 1):
        if index == len(places) or places[index] != places[index - 1] + 1:
            yield MediaSpan(places[begin], index - begin, key, bidirectional, begin)
            begin = index
