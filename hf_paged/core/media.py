"""Images (and other media) within prompts: where they stand, what names them, and how they cut a prompt into chunks.

An image's tokens are placeholders whose embeddings an encoder computes. To the scheduler it is a span of tokens with a
key that names its content. Where its tokens see each other in both directions, the span is computed in one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as AbstractSequence
from typing import NamedTuple

from .request import MediaSpan, Sequence


class MediaRows(NamedTuple):
    """The rows of a step whose embeddings come from an encoder: some tokens of one span.

    Attributes:
        seq_id: whose they are.
        row: the first packed row.
        count: how many rows they are.
        key: the span's.
        offset: of the content's embeddings, the first that they get.
        seen: tokens of the sequence that all of these rows see, whatever their positions; 0: each sees those up to itself.
    """

    seq_id: int
    row: int
    count: int
    key: bytes
    offset: int
    seen: int


def media_rows(seq: Sequence, count: int, row: int) -> Iterator[MediaRows]:
    """Those of the next `count` tokens of `seq`, the first of which is the packed row `row`."""
    begin, media = seq.num_computed, seq.request.media
    for span in media:
        first, last = max(begin, span.start), min(begin + count, span.end)
        if first < last:
            seen = _block_of(media, span)[1] if span.bidirectional else 0
            offset = span.offset + first - span.start
            yield MediaRows(seq.seq_id, row + first - begin, last - first, span.key, offset, seen)


def whole_blocks(media: AbstractSequence[MediaSpan], begin: int, count: int) -> int:
    """The largest part of `count` tokens from `begin` on that ends within no bidirectional block."""
    end = begin + count
    for first, last in bidirectional_blocks(media):
        if first < end < last:
            return max(0, first - begin)
    return count


def rest_of_block(media: AbstractSequence[MediaSpan], position: int) -> int:
    """Tokens from `position` to the end of the bidirectional block it lies in, which are computed together; 1 if in none."""
    return next((last - position for first, last in bidirectional_blocks(media) if first <= position < last), 1)


def longest_block(media: AbstractSequence[MediaSpan]) -> int:
    """Tokens of the longest bidirectional block; 0 if there is none."""
    return max((last - first for first, last in bidirectional_blocks(media)), default=0)


def bidirectional_blocks(media: AbstractSequence[MediaSpan]) -> Iterator[tuple[int, int]]:
    """(first token, end) of every run of bidirectional spans: those without a token between them see each other."""
    first = last = None
    for span in media:
        if not span.bidirectional:
            continue
        if first is None or span.start != last:
            if first is not None:
                yield first, last
            first = span.start
        last = span.end
    if first is not None:
        yield first, last


def _block_of(media: AbstractSequence[MediaSpan], span: MediaSpan) -> tuple[int, int]:
    return next(block for block in bidirectional_blocks(media) if block[0] <= span.start < block[1])


def check_media(media: AbstractSequence[MediaSpan], num_prompt: int) -> None:
    """Spans lie within the prompt, in order, without overlap."""
    end = 0
    for span in media:
        assert end <= span.start and span.length >= 1, "media spans must be in order and must not overlap"
        end = span.end
    assert end <= num_prompt, "media spans must lie within the prompt"


class EncoderBudget:
    """How many placeholder tokens a step may have encoded. One span always may, however long it is.

    Args:
        most: tokens a step.
        is_encoded: whether the encoder's output for a key is at hand.
    """

    def __init__(self, most: int, is_encoded: Callable[[bytes], bool]):
        assert most >= 1
        self._most = most
        self._is_encoded = is_encoded
        self._taken: dict[tuple[bytes, int], int] = {}  # key and offset -> tokens that the step being planned encodes

    def renew(self) -> None:
        """A step begins."""
        self._taken.clear()

    def within(self, seq: Sequence, count: int) -> int:
        """How many of the next `count` tokens of `seq` can be computed with what is left; 0 if the first cannot."""
        begin = seq.num_computed
        left = self._most - sum(self._taken.values())
        new: set[tuple[bytes, int]] = set()
        for span in self._spans(seq, count):
            part = span.key, span.offset
            if part in self._taken or part in new or self._is_encoded(span.key):
                continue
            if left < span.length and (self._taken or new):
                return max(0, span.start - begin)
            new.add(part)
            left -= span.length
        return count

    def take(self, seq: Sequence, count: int) -> None:
        """The step computes the next `count` tokens of `seq`."""
        for span in self._spans(seq, count):
            if not self._is_encoded(span.key):
                self._taken[span.key, span.offset] = span.length

    @staticmethod
    def _spans(seq: Sequence, count: int) -> Iterator[MediaSpan]:
        begin, end = seq.num_computed, seq.num_computed + count
        return (span for span in seq.request.media if span.start < end and span.end > begin)
