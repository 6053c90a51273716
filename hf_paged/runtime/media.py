"""Embeddings of images: what a request brings along, the encoder's outputs that are kept, and how a step gets its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from ..core.media import MediaRows
from ..core.plan import StepPlan
from ..core.request import MediaSpan


@dataclass(frozen=True, eq=False, slots=True)
class MediaItem:
    """What an encoder sees at once: an image, or a part of one that it sees by itself.

    Attributes:
        key: names the content.
        num_tokens: placeholders in the prompt.
        inputs: what the encoder is given, by name, on the host.
        embeddings: [num_tokens, H], where they are known already.
    """

    key: bytes
    num_tokens: int
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    embeddings: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Of the inputs."""
        return sum(value.nbytes for value in self.inputs.values())


@dataclass(frozen=True, eq=False, slots=True)
class Media:
    """The images of one prompt.

    Attributes:
        spans: where their tokens stand; see `Request.media`.
        items: by the key of the spans.
        shifts: int64 [P, tokens of the prompt], by how much the positions that the model is told, in each of P planes, differ
            from the tokens' places; tokens after the prompt have its last one's. None: they do not.
    """

    spans: tuple[MediaSpan, ...] = ()
    items: Mapping[bytes, MediaItem] = field(default_factory=dict)
    shifts: np.ndarray | None = None


NO_MEDIA = Media()


def position_shifts(plan: StepPlan, media_of: Callable[[int], Media]) -> np.ndarray | None:
    """int64 [P, T]: the shifts of a step's packed rows. One plane where all are the same, None where there is none.

    Args:
        media_of: by seq_id, the images of its prompt.
    """
    found, row = None, 0
    for seq_id, new, begin in zip(plan.seq_ids, plan.num_new, plan.num_context, strict=True):
        shifts = media_of(seq_id).shifts
        if shifts is not None:
            if found is None:
                found = np.zeros((len(shifts), plan.num_tokens), dtype=np.int64)
            own = shifts[:, begin : begin + new]
            known = own.shape[1]
            found[:, row : row + known] = own
            found[:, row + known : row + new] = shifts[:, -1:]
        row += new
    if found is None or not found.any():
        return None
    return found[:1] if (found == found[:1]).all() else found


class MediaModel(Protocol):
    """What the engine needs of a model that takes images; the hf room provides it for transformers models."""

    @property
    def token_id(self) -> int:
        """The placeholder's."""
        ...

    @property
    def shifts_positions(self) -> bool:
        """Whether images move the positions of what follows them: see `Media.shifts`."""
        ...

    def read(self, token_ids: list[int], inputs: Mapping[str, object]) -> Media:
        """The images of a prompt.

        Args:
            inputs: what the model's processor made of them, for this prompt alone.

        Raises InvalidArgument if the two do not go together.
        """
        ...

    def encode(self, items: Sequence[MediaItem]) -> list[Tensor]:
        """The embeddings [num_tokens, H] of each."""
        ...


class EncodingFailed(Exception):
    """The encoder failed with one item, `key`, and `__cause__` is why. Others are not to blame."""

    def __init__(self, key: bytes):
        super().__init__("an image could not be encoded")
        self.key = key


class EncoderOutputs:
    """The embeddings that were computed last, by key.

    Args:
        encode: see `MediaModel`.
        max_bytes: what is kept. What a step needs it gets, however large.
    """

    def __init__(self, encode: Callable[[Sequence[MediaItem]], list[Tensor]], max_bytes: int):
        self._encode = encode
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self.num_bytes = 0
        self.encoded_tokens = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._kept

    def clear(self) -> None:
        """The encoder's weights changed."""
        self._kept.clear()
        self.num_bytes = 0

    def gather(self, rows: Sequence[MediaRows], item_of: Callable[[MediaRows], MediaItem]) -> list[tuple[int, Tensor]]:
        """(first packed row, embeddings [count, H] from there on) for each of a step's `rows`.

        Raises EncodingFailed.
        """
        items = {row.key: item_of(row) for row in rows}
        found = {key: item.embeddings for key, item in items.items() if item.embeddings is not None}
        for key in items.keys() - found.keys():
            if key in self._kept:
                self._kept.move_to_end(key)
                found[key] = self._kept[key]
        found |= self._computed([item for key, item in items.items() if key not in found])
        return [(row.row, found[row.key][row.offset : row.offset + row.count]) for row in rows]

    def _computed(self, items: list[MediaItem]) -> dict[bytes, Tensor]:
        if not items:
            return {}
        try:
            outputs = self._checked(items)
        except Exception as error:
            if len(items) == 1:
                raise EncodingFailed(items[0].key) from error
            outputs = [self._computed([item])[item.key] for item in items]  # those before the failing one are kept
            return {item.key: output for item, output in zip(items, outputs, strict=True)}
        for item, output in zip(items, outputs, strict=True):
            self._keep(item.key, output)
            self.encoded_tokens += item.num_tokens
        return {item.key: output for item, output in zip(items, outputs, strict=True)}

    def _checked(self, items: list[MediaItem]) -> list[Tensor]:
        outputs = self._encode(items)
        for item, output in zip(items, outputs, strict=True):
            if len(output) != item.num_tokens:
                raise ValueError(
                    f"the encoder gave {len(output)} embeddings for {item.num_tokens} tokens of the prompt"
                )
        return outputs

    def _keep(self, key: bytes, output: Tensor) -> None:
        self._kept[key] = output
        self.num_bytes += output.nbytes
        while self.num_bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= oldest.nbytes
