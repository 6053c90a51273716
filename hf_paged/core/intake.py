"""Requests at the door: what is wrong with them, and when they have to be done."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from ..base.errors import InvalidArgument, RequestTooLarge
from .media import check_media, longest_block
from .request import Request
from .resize import why_too_large
from .tables import BlockTables


def check_request(
    request: Request, tables: BlockTables, *, max_batch_tokens: int, max_num_seqs: int, max_model_len: int
) -> None:
    """Refuse what is wrong (InvalidArgument) or could never run (RequestTooLarge)."""
    num_prompt, n = len(request.prompt_token_ids), request.n
    if not num_prompt:
        raise InvalidArgument("prompt is empty; give at least one token")
    if n < 1 or n > max_num_seqs:
        raise InvalidArgument(f"n must be between 1 and max_num_seqs ({max_num_seqs}), got {n}")
    if request.max_tokens < 0 or n > 1 and not request.max_tokens:
        raise InvalidArgument(f"max_tokens must be at least 1 (or 0 with an n of 1), got {request.max_tokens}")
    longest = max_model_len - bool(request.max_tokens)
    if num_prompt > longest:
        raise RequestTooLarge(
            f"prompt has {num_prompt} tokens, but with max_model_len {max_model_len} it can have at most {longest}; "
            "shorten it or raise max_model_len"
        )
    if len(request.begun) >= max(1, min(request.max_tokens, max_model_len - num_prompt)):
        raise InvalidArgument(
            f"max_tokens {request.max_tokens}: the output has {len(request.begun)} tokens already, and would end with them"
        )
    check_media(request.media, num_prompt)
    whole = longest_block(request.media)
    if whole > max_batch_tokens:
        raise RequestTooLarge(
            f"an image of {whole} tokens, which see each other and are computed together, exceeds max_batch_tokens "
            f"({max_batch_tokens}); raise it, or use smaller images"
        )
    if tables.has_state and n > tables.slots.max_blocks:
        raise RequestTooLarge(
            f"n {n} takes {n} state slots, but the cache holds at most {tables.slots.max_blocks}; "
            "raise kv_cache_memory, or lower n"
        )
    reason = why_too_large(tables, request, tables.max_blocks, max_model_len)
    if reason is not None:
        raise RequestTooLarge(reason)


class Deadlines:
    """Who has to be done by when.

    Args:
        requests: the unfinished ones by id; those that have ended leave lazily.
    """

    def __init__(self, requests: Mapping[str, Request]):
        self._requests = requests
        self._heap: list[tuple[float, int, Request]] = []

    def add(self, request: Request, number: int) -> None:
        """`number`: nobody else's."""
        if request.deadline is not None:
            heapq.heappush(self._heap, (request.deadline, number, request))

    def expired(self, now: float) -> list[Request]:
        """See `Scheduler.expired`."""
        passed = []
        while self._heap and self._heap[0][0] <= now:
            entry = heapq.heappop(self._heap)
            if self._requests.get(entry[2].request_id) is entry[2]:
                passed.append(entry)
        for entry in passed:
            heapq.heappush(self._heap, entry)
        return [request for _, _, request in passed]
