"""The images of a call of `generate`: which of its inputs they are, and whose row each embedding belongs to."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...base.errors import InvalidArgument
from ...runtime.media import NO_MEDIA, Media, MediaItem
from .families import features, flat
from .model import TransformersImages, content_key, spans_of
from .positions import OF_THE_POSITIONS, go_on, planes_of, seen_from, shifts_of

ENCODED = "mm_encoder_outputs"  # what newer transformers encodes before it decodes
TYPES = "token_type_ids"


def input_names(images: TransformersImages | None) -> frozenset[str]:
    """Keyword arguments of a forward that bring images."""
    if images is None:
        return frozenset()
    beside = OF_THE_POSITIONS if images.shifts_positions else [TYPES] if images.family.bidirectional else []
    return frozenset((*images.family.names, ENCODED, *beside))


def why_not(images: TransformersImages, input_ids: Tensor, inputs: dict) -> Iterator[tuple[str, str]]:
    """Reasons why the images among a forward's `inputs` do not go on pages."""
    encoded = inputs.get(ENCODED)
    if encoded:
        others = sorted(set(encoded) - {"image"})
        if others:
            yield ENCODED, f"{others[0]} is not on pages"
    types = inputs.get(TYPES)
    if types is not None and images.family.bidirectional and bool((types == 1).any()):
        seen = types == 1
        if seen.shape != input_ids.shape or bool((seen & (input_ids != images.token_id)).any()):
            yield TYPES, "other tokens than those of images see each other"


def has_images(images: TransformersImages | None, inputs: dict) -> bool:
    if images is None:
        return False
    encoded = inputs.get(ENCODED) or {}
    return encoded.get("image") is not None or inputs.get(images.family.names[0]) is not None


def take_images(images: TransformersImages, input_ids: Tensor, padding: list[int], inputs: dict) -> list[Media]:
    """The images of every row, as transformers lays them over the placeholders of all rows, in order.

    Args:
        input_ids: [B, L], of which each row's first `padding` columns do not count.
        inputs: the forward's keyword arguments. Where images move positions, `position_ids` are among them.

    Raises InvalidArgument if there are more or fewer embeddings than placeholders, as transformers does.
    """
    embeddings = _features(images, inputs)
    places = input_ids == images.token_id
    if int(places.sum()) != len(embeddings):
        raise InvalidArgument(
            f"pixel_values: image features and image tokens do not match, tokens: {int(places.sum())}, features: "
            f"{len(embeddings)}"
        )
    types, planes = inputs.get(TYPES), None
    if images.shifts_positions:
        planes = planes_of(inputs["position_ids"]).expand(-1, *input_ids.shape)
    found, start = [], 0
    for row, skipped in enumerate(padding):
        columns = places[row].nonzero()[:, 0]
        own = embeddings[start : start + len(columns)]
        start += len(columns)
        two_way = None if types is None else types[row, columns].tolist()
        positions = None if planes is None else planes[:, row, skipped:]
        found.append(_row((columns - skipped).tolist(), own, two_way, positions))
    return found


def count_themselves(images: TransformersImages, input_ids: Tensor, padding: list[int], position_ids: Tensor) -> bool:
    """Whether the positions of every row are what its images make them, so that it does not matter what else is given.

    Args:
        position_ids: [3 or 4, B, L].
    """
    if position_ids.shape[1:] != input_ids.shape:
        return False
    places, planes = input_ids == images.token_id, planes_of(position_ids)
    return all(go_on(planes[:, row, skipped:], places[row, skipped:]) for row, skipped in enumerate(padding))


def _row(places: list[int], embeddings: Tensor, two_way: list[int] | None, positions: Tensor | None) -> Media:
    """A span for every run of placeholders."""
    if not places:
        return NO_MEDIA
    spans, items = [], {}
    for run in spans_of(b"", places, False):
        own = embeddings[run.offset : run.offset + run.length]
        named = {"embeddings": own}
        if positions is not None:
            named["positions"] = seen_from(positions, run)
        key = content_key(named)
        kinds = two_way and two_way[run.offset : run.offset + run.length]
        if kinds and len(set(kinds)) != 1:
            raise InvalidArgument("token_type_ids: they differ within an image")
        spans += spans_of(key, range(run.start, run.end), bool(kinds and kinds[0] == 1))
        items[key] = MediaItem(key, run.length, embeddings=own)
    return Media(tuple(spans), items, None if positions is None else shifts_of(positions))


def _features(images: TransformersImages, inputs: dict) -> Tensor:
    encoded = (inputs.get(ENCODED) or {}).get("image")
    dtype = images.model.get_input_embeddings().weight.dtype
    if encoded is None:
        given = {name: inputs[name] for name in images.family.names if inputs.get(name) is not None}
        with torch.no_grad():
            return features(images.model, given).to(images.model.device, dtype)
    return flat(encoded).to(images.model.device, dtype)
