"""Requests and the sequences (completions) they consist of."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field


class SequenceStatus(enum.Enum):
    """Where a sequence is: waiting sequences hold no blocks, running ones hold a seat and blocks."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class MediaSpan:
    """Tokens of a prompt that stand for a piece of an image.

    Attributes:
        start: the first of them.
        length: how many they are.
        key: names the content; equal keys mean equal embeddings.
        bidirectional: they see each other, and those of bidirectional spans right beside them, whatever the order.
        offset: of the content's embeddings, the first that they get.
    """

    start: int
    length: int
    key: bytes
    bidirectional: bool = False
    offset: int = 0

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One prompt and what to do with it. The scheduler fills `sequences`, `first_scheduled` and `rank`.

    Attributes:
        request_id: unique among the unfinished requests of a scheduler.
        prompt_token_ids: the prompt; at least one token.
        begun: output tokens that all its completions begin with: known, and yet output.
        n: completions wanted. The prompt is computed once for all of them.
        max_tokens: most output tokens of each completion. 0: none are sampled, it ends when its prompt is computed.
        min_tokens: EOS and stop tokens end nothing before this many output tokens.
        stop_token_ids: tokens that end a completion and are named as its `stop_reason`.
        eos_token_ids: tokens that end a completion; empty when EOS is to be ignored.
        priority: lower runs first under the "priority" policy.
        user: whose request it is, for the "fair" policy. None, as "": nobody's in particular.
        arrival: seconds on the `time.monotonic` clock.
        deadline: same clock; after it `Scheduler.expired` names the request. None: no deadline.
        cache_salt: separates prefix-cache entries: equal prompts share blocks only under equal salts.
        adapter: what the model's weights are changed by for this request: a number that nothing else ever had; 0: nothing.
            It separates prefix-cache entries, too.
        media: the spans of the prompt whose embeddings come from an encoder, in order. Their keys separate prefix-cache
            entries from there on.
        max_cached_tokens: most leading tokens it may have from the prefix cache: what comes of the others is wanted. 0 computes
            every token anew (its blocks still serve others). None: any.
        write_prefix_cache: False keeps its blocks out of the prefix cache; its own completions still share them.
        params: the engine's sampling parameters; opaque here.
        state: the engine's own state; opaque here.
        sequences: the completions so far. The leader alone until the prompt is computed, then `n`.
        first_scheduled: seconds on the `time.monotonic` clock; None while it has never run.
        rank: what a policy ranks it by, if that is settled when it comes.
    """

    request_id: str
    prompt_token_ids: list[int]
    max_tokens: int
    begun: list[int] = field(default_factory=list)
    n: int = 1
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()
    priority: int = 0
    user: str | None = None
    arrival: float = field(default_factory=time.monotonic)
    deadline: float | None = None
    cache_salt: str | bytes | None = None
    adapter: int = 0
    media: tuple[MediaSpan, ...] = ()
    max_cached_tokens: int | None = None
    write_prefix_cache: bool = True
    params: object = None
    state: object = None
    sequences: list[Sequence] = field(default_factory=list)
    first_scheduled: float | None = None
    rank: int = 0

    @property
    def reads_prefix_cache(self) -> bool:
        return self.max_cached_tokens != 0

    @property
    def finished(self) -> bool:
        """Whether it was added and all its sequences have finished."""
        return bool(self.sequences) and all(seq.status is SequenceStatus.FINISHED for seq in self.sequences)


class Sequence:
    """One completion of a request: its tokens, and the blocks that hold their keys and values.

    Attributes:
        seq_id: unique within a scheduler; the ids of one request are consecutive.
        index: 0 to n - 1 within the request.
        order: what the scheduling policy sorts by; smaller runs first, larger is preempted first.
        token_ids: prompt and output, as far as they are known.
        num_unknown: output tokens after those, sampled by steps whose results nobody has read yet.
        num_prompt: tokens of the prompt.
        num_computed: tokens whose keys and values are in the cache. It counts a step's tokens once it is launched.
        block_tables: per group, the block of every `block_size` tokens; -1 where a sliding group gave it back.
        state_slot: where its recurrent state is, for models that keep one. Like a block it may be shared after a fork.
        block_keys: prefix-cache keys of the full blocks, as far as they were needed.
        publishable: whether its blocks may enter the prefix cache (not when older weights computed part of them, nor if its
            request keeps them out).
        pending_forks: siblings still to be forked off when the prompt is computed; each has a seat reserved.
        num_cached_tokens: prompt tokens found in the prefix cache when it first ran.
        num_preemptions: times it lost its blocks to another sequence.
        num_draft_tokens, num_accepted_tokens: guesses of its next tokens that were computed, and that were right.
    """

    __slots__ = (
        "block_keys",
        "block_tables",
        "finish_reason",
        "index",
        "num_accepted_tokens",
        "num_cached_tokens",
        "num_computed",
        "num_draft_tokens",
        "num_preemptions",
        "num_prompt",
        "num_unknown",
        "order",
        "pending_forks",
        "publishable",
        "request",
        "seq_id",
        "state_slot",
        "status",
        "stop_reason",
        "token_ids",
    )

    def __init__(self, seq_id: int, request: Request, index: int, order: tuple[int, int], num_groups: int):
        self.seq_id = seq_id
        self.request = request
        self.index = index
        self.order = order
        self.token_ids = [*request.prompt_token_ids, *request.begun]
        self.num_prompt = len(request.prompt_token_ids)
        self.num_unknown = 0
        self.num_computed = 0
        self.block_tables: list[list[int]] = [[] for _ in range(num_groups)]
        self.state_slot: int | None = None
        self.block_keys: list[bytes] = []
        self.publishable = True
        self.pending_forks = 0
        self.status = SequenceStatus.WAITING
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    @property
    def num_output(self) -> int:
        """Known output tokens."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_tokens(self) -> int:
        """Prompt and output, unknown tokens included."""
        return len(self.token_ids) + self.num_unknown

    @property
    def num_remaining(self) -> int:
        """Tokens that are not computed yet: 1 for a decode, more for a prefill."""
        return len(self.token_ids) + self.num_unknown - self.num_computed

    def num_allowed(self, max_model_len: int) -> int:
        """Tokens it may still get. None are left to a sequence whose last one is unknown, as to one that has ended."""
        return min(self.num_prompt + self.request.max_tokens, max_model_len) - self.num_tokens

    @property
    def seats(self) -> int:
        """Running places it takes, those reserved for siblings to be forked included."""
        return 1 + self.pending_forks

    def append(self, token: int) -> None:
        self.token_ids.append(token)

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id}, {self.request.request_id!r}[{self.index}], {self.status.value}, "
            f"{self.num_computed}/{len(self.token_ids)} tokens)"
        )


def append_tokens(seq: Sequence, tokens: list[int], max_model_len: int) -> tuple[str, int | None] | None:
    """Append output tokens up to the first that ends `seq`; (finish reason, stop reason) if one does, else None."""
    for token in tokens:
        seq.append(token)
        verdict = check_finished(seq, max_model_len)
        if verdict is not None:
            return verdict
    return None


def check_finished(seq: Sequence, max_model_len: int) -> tuple[str, int | None] | None:
    """(finish reason, stop reason) if the last output token ends `seq`, else None."""
    request, token, num_output = seq.request, seq.token_ids[-1], seq.num_output
    if num_output >= request.min_tokens:
        if token in request.eos_token_ids:
            return "stop", None
        if token in request.stop_token_ids:
            return "stop", token
    if num_output >= request.max_tokens or len(seq.token_ids) >= max_model_len:
        return "length", None
    return None
