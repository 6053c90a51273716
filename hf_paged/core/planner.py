"""Planning a step: who runs on how many tokens, who is admitted, who gives way."""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from dataclasses import dataclass, fields
from itertools import islice

from .media import EncoderBudget, longest_block, rest_of_block, whole_blocks
from .overtaking import Overtaking
from .parking import Parked
from .queues import Queues
from .request import Request, Sequence, SequenceStatus
from .step import StepBuilder
from .tables import BlockTables

SHORT_STEP = 0.25  # of the token budget: all that a step is filled with while somebody's prompt has priority


@dataclass(slots=True)
class Counts:
    """What a scheduler counts from one `reset` to the next.

    Tokens; preemptions, and how many of them were to host memory and came back; requests that overtook others.
    """

    prefix_hit_tokens: int = 0
    prefix_queried_tokens: int = 0
    host_hit_tokens: int = 0
    disk_hit_tokens: int = 0
    preemptions: int = 0
    swaps_out: int = 0
    swaps_in: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    forced_tokens: int = 0
    overtakes: int = 0

    def reset(self) -> None:
        for field in fields(self):
            setattr(self, field.name, 0)


class Planner:
    """Walks down the order of all sequences and gives each what budget, seats and blocks allow.

    Args:
        max_batch_tokens, max_num_seqs, max_model_len, whole_prompts: as the scheduler's.
        encoder: what a step may have encoded; None: anything.
        new_sequence: `new_sequence(request, index, seq_id)` brings a sibling into being.
        held_blocks: whether held sequences have some of the blocks.
        empty_held: takes the blocks of a held sequence that can do without; False if there is none.
        empty_pinned: takes the blocks of a pinned one; False if there is none.
    """

    def __init__(
        self,
        tables: BlockTables,
        queues: Queues,
        counts: Counts,
        *,
        max_batch_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        whole_prompts: bool,
        encoder: EncoderBudget | None,
        new_sequence: Callable[[Request, int, int], Sequence],
        held_blocks: Callable[[], bool],
        empty_held: Callable[[], bool],
        empty_pinned: Callable[[], bool],
    ):
        self._tables = tables
        self._queues = queues
        self._counts = counts
        self._max_batch_tokens = max_batch_tokens
        self._left_empty = max_batch_tokens - int(SHORT_STEP * max_batch_tokens)
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len
        self._whole_prompts = whole_prompts
        self._encoder = encoder
        self._new_sequence = new_sequence
        self._held_blocks = held_blocks
        self._empty_held = empty_held
        self._empty_pinned = empty_pinned
        self._overtaking = Overtaking(tables, queues.waiting, reach=2 * max_num_seqs)
        self._blocked: tuple[int, int] | None = None  # (seq_id, num_releases) of a sequence that found no blocks

    def plan(self, only: Container[int] | None) -> StepBuilder:
        """What the next step computes. With `only`, no other sequence ids run."""
        step = StepBuilder(self._max_batch_tokens, only, len(self._tables.pools))
        if self._encoder is not None:
            self._encoder.renew()
        self._queues.rerank()
        running = [seq for seq in self._queues.running if step.may_run(seq) and not self._has_its_last(seq)]
        step.decodes = {seq.seq_id for seq in running if seq.num_remaining == 1}
        for seq in running:
            if len(self._queues.waiting):
                self._admit_before(step, seq.order)
            if seq.status is SequenceStatus.RUNNING:  # not preempted by one before it
                self._advance(step, seq)
        self._admit_before(step, None)
        step.changes.release_sources()
        return step

    def _has_its_last(self, seq: Sequence) -> bool:
        """Whether `seq` ends, whatever its unknown token is (if it wants any), with the step that is under way."""
        return not seq.num_remaining or seq.num_unknown > 0 and not seq.num_allowed(self._max_model_len)

    def send_back(self, seq: Sequence) -> None:
        """From running to waiting, with nothing computed."""
        self._queues.send_back(seq)
        self._tables.release(seq)

    def preempt(self, victim: Sequence, *, may_swap: bool = True) -> None:
        """From running to waiting, with what was computed in host memory, or with nothing."""
        victim.num_preemptions += 1
        self._counts.preemptions += 1
        if may_swap and self._tables.swap_out(victim):
            self._counts.swaps_out += 1
            self._queues.send_back(victim)
        else:
            self.send_back(victim)

    def preempt_last(self, *, may_swap: bool = True) -> bool:
        """Preempt the running sequence that is last in order, for a held one or a smaller cache. False if none runs."""
        if not self._queues.running:
            return False
        self.preempt(self._queues.running[-1], may_swap=may_swap)
        return True

    # -- those that run

    def _advance(self, step: StepBuilder, seq: Sequence) -> None:
        """Schedule the running `seq` for as many tokens as budget and blocks allow; preempt others if for none."""
        step.decodes.discard(seq.seq_id)
        remaining = seq.num_remaining
        least, want = self._chunk(step, seq)
        if want < 1:
            return
        self._tables.release_unseen(seq)
        while (count := self._tables.room(seq, want)) < least:
            if not self._make_room(step, seq, admitting=False):
                return  # it keeps what it has and waits for blocks
        if seq.request.media:
            count = whole_blocks(seq.request.media, seq.num_computed, count)
            if self._encoder is not None:
                self._encoder.take(seq, count)
        self._tables.extend(seq, count, step.changes)
        if count > 1:
            step.level = min(step.level, self._queues.waiting.level(seq.request))
        if count < remaining:
            step.add(seq, count, [])
            step.prefills.append((seq, seq.num_computed + count))
            return
        step.add(seq, count, list(range(seq.seq_id, seq.seq_id + seq.seats)) if seq.request.max_tokens else [])
        if seq.pending_forks:
            self._fork(step, seq)

    def _chunk(self, step: StepBuilder, seq: Sequence) -> tuple[int, int]:
        """(fewest, most) of the next tokens of `seq` that the step may compute. At most 0: none, for want of budget.

        What must be computed together takes its place in the budget as if it had the room.
        """
        media, begin = seq.request.media, seq.num_computed
        most = min(seq.num_remaining, self._spare_budget(step, seq))
        if most < 1:
            return 1, 0
        if self._whole_prompts and not begin:
            return seq.num_prompt, seq.num_prompt
        if not media or begin >= media[-1].end:
            return 1, most
        least = rest_of_block(media, begin)
        most = whole_blocks(media, begin, max(least, most))
        if self._encoder is not None:
            most = whole_blocks(media, begin, self._encoder.within(seq, most))
        return least, most

    def _spare_budget(self, step: StepBuilder, seq: Sequence) -> int:
        """Tokens that `seq` may have computed, but for those of coming decodes.

        A step takes as long as all its prompts together. So one with a prompt of a higher level is filled with others' only
        as far as it stays short. They lose little: where arithmetic is the bound, short steps follow each other faster.
        """
        spare = step.spare_budget
        if seq.num_remaining > 1 and self._queues.waiting.level(seq.request) > step.level:
            spare -= self._left_empty
        return spare

    # -- those that wait

    def _admit_before(self, step: StepBuilder, order: tuple[int, int] | None) -> None:
        """Admit waiting sequences while that works: those that rank before `order`, or all."""
        if step.walk is None:
            step.walk = self._queues.waiting.walk()
        while step.admitting:
            head = step.walk.head()
            if head is None or order is not None and head.order > order:
                return
            if not step.may_run(head):
                step.walk.pass_over(head)
            elif head.seq_id in step.preempted or head.num_unknown:
                step.admitting = False  # (preempted with an unknown token, it cannot be recomputed yet)
            elif self._spare_budget(step, head) < 1 or self._is_blocked(step, head):
                step.admitting = False
            else:
                step.admitting = self._admit_one(step, head, order)

    def _admit_one(self, step: StepBuilder, head: Sequence, order: tuple[int, int] | None) -> bool:
        """Admit `head` or whoever may overtake it, or hold one of them back. False: none of them can be."""
        if self._queues.seats_used < self._max_num_seqs:
            seq = self._overtaking.choose(step, head, order)
            if seq is not head and self._admit(step, seq):
                self._counts.overtakes += seq.status is SequenceStatus.RUNNING
                return True
        return self._admit(step, head)

    def _is_blocked(self, step: StepBuilder, head: Sequence) -> bool:
        """Whether it found no blocks when it was last tried, and none were released since."""
        return (
            bool(self._queues.running)
            and step.only is None
            and self._blocked == (head.seq_id, self._tables.num_releases)
        )

    def _admit(self, step: StepBuilder, seq: Sequence) -> bool:
        """Seat and schedule the waiting `seq`, or hold it back. False: it lacks seats or blocks."""
        tables = self._tables
        if not self._free_seats(step, seq):
            return False
        parked = tables.parking.take(seq)
        if parked is None:
            num_hit = self._find(step, seq)
            if num_hit is None:
                step.walk.pass_over(seq)
                return True
            tables.take_hit(seq, num_hit)
        if self._chunk(step, seq)[1] < 1:  # its next image has to wait for the encoder
            self._put_back(seq, parked)
            step.walk.pass_over(seq)
            return True
        while not self._fits(step, seq):
            if not self._make_room(step, seq, admitting=True):
                self._put_back(seq, parked)
                self._blocked = (seq.seq_id, tables.num_releases)
                return False
        self._load(step, seq, parked)
        self._queues.seat(seq)
        self._note_admission(seq)
        self._advance(step, seq)
        assert seq.seq_id in step.busy, "admitted without room: it might share blocks whose step fails"
        return True

    def _find(self, step: StepBuilder, seq: Sequence) -> int | None:
        """Leading blocks of `seq` in the prefix cache; None: more are on their way there, which are worth waiting for."""
        tables = self._tables
        if not tables.prefix_cache:
            return 0
        if step.only is None:  # those are to run now
            if tables.is_reading(seq):
                return None
            self._counts.disk_hit_tokens += tables.take_read(seq) * tables.block_size
        num_hit = tables.best_hit(seq)
        return None if self._is_coming(step, seq, num_hit) else num_hit

    def _put_back(self, seq: Sequence, parked: Parked | None) -> None:
        """It is not admitted after all."""
        if parked is None:
            self._tables.release(seq)
        else:
            self._tables.parking.put_back(seq, parked)

    def _load(self, step: StepBuilder, seq: Sequence, parked: Parked | None) -> None:
        """Bring what an admitted sequence has in host memory to the device."""
        seq.publishable = seq.request.write_prefix_cache
        num_blocks = self._tables.load(seq, step.changes)
        if parked is None:
            self._counts.host_hit_tokens += num_blocks * self._tables.block_size
        else:
            self._counts.swaps_in += 1

    def _free_seats(self, step: StepBuilder, seq: Sequence) -> bool:
        """Whether `seq` finds seats, for the siblings it will fork too; preempts for them if that is enough."""
        lacking = self._queues.seats_used + seq.seats - self._max_num_seqs
        if lacking <= 0:
            return True
        victims = [other for other in self._queues.running if self._yields(step, other, seq, admitting=True)]
        if sum(victim.seats for victim in victims) < lacking:
            return False
        while self._queues.seats_used + seq.seats > self._max_num_seqs:
            self._preempt(step, victims.pop())
        return True

    def _fits(self, step: StepBuilder, seq: Sequence) -> bool:
        """Whether there are blocks for all of `seq`'s known tokens and one more for every seat taken.

        Admitting more would only preempt somebody a few steps later. What runs alone always fits: `add` saw to that.
        """
        if not self._queues.running and not self._held_blocks():
            return True
        chunk = max(min(step.spare_budget, seq.num_remaining), longest_block(seq.request.media))
        return self._tables.fits(seq, chunk, headroom=self._queues.seats_used + seq.pending_forks)

    def _is_coming(self, step: StepBuilder, seq: Sequence, num_hit: int) -> bool:
        """Whether a prefill of this very step will soon compute the next block of `seq`'s prompt.

        It is worth waiting for. Only prefills that advance in this step count, so nobody waits for nothing.
        """
        if not self._tables.prefix_cache:
            return False
        block_size = self._tables.block_size
        most, end_of_block = seq.request.max_cached_tokens, (num_hit + 1) * block_size
        if end_of_block >= len(seq.token_ids) or most is not None and end_of_block > most:
            return False
        return any(
            leader.publishable
            and end < end_of_block <= len(leader.token_ids)
            and leader.block_keys[num_hit] == seq.block_keys[num_hit]
            for leader, end in step.prefills
        )

    # -- who gives way

    def _make_room(self, step: StepBuilder, seq: Sequence, admitting: bool) -> bool:
        """Take blocks for `seq` from whoever gives way. False if nobody does."""
        if self._empty_held():
            return True
        victim = self._victim(step, seq, admitting)
        if victim is None:
            alone = not any(other is not seq for other in self._queues.running)
            return alone and self._empty_pinned()  # nobody else is left to wait for
        self._preempt(step, victim)
        return True

    def _victim(self, step: StepBuilder, seq: Sequence, admitting: bool) -> Sequence | None:
        """The running sequence, last in order, that must give its blocks to `seq`; None if there is none."""
        candidates = reversed(self._queues.running)
        if step.only is None and not admitting:
            candidates = islice(candidates, 1)  # if the last does not yield, nobody does
        return next((other for other in candidates if self._yields(step, other, seq, admitting)), None)

    def _yields(self, step: StepBuilder, other: Sequence, seq: Sequence, admitting: bool) -> bool:
        """Whether the running `other` may be preempted for `seq`: never if it is part of this step already.

        Nor if it has its last token: then its blocks are free with the next step.
        """
        if other.seq_id in step.busy or other is seq or self._has_its_last(other):
            return False
        if not step.may_run(other):
            return True
        if admitting:
            return self._queues.waiting.takes_from(seq, other)
        return other.order > seq.order

    def _fork(self, step: StepBuilder, leader: Sequence) -> None:
        """The step completes the prompt: its siblings come into being, sharing every block."""
        for index in range(1, leader.request.n):
            sibling = self._new_sequence(leader.request, index, leader.seq_id + index)
            self._tables.fork(leader, sibling)
            sibling.num_cached_tokens = leader.num_cached_tokens
            self._queues.seat_sibling(sibling, leader)
            step.forked.append(sibling)
            step.busy.add(sibling.seq_id)

    def _note_admission(self, seq: Sequence) -> None:
        request = seq.request
        if request.first_scheduled is not None:
            return
        request.first_scheduled = time.monotonic()
        seq.num_cached_tokens = seq.num_computed
        self._queues.waiting.computed(request, len(seq.token_ids) - seq.num_computed)
        if self._tables.prefix_cache and request.reads_prefix_cache:
            self._counts.prefix_hit_tokens += seq.num_computed
            self._counts.prefix_queried_tokens += len(seq.token_ids)

    def _preempt(self, step: StepBuilder, victim: Sequence) -> None:
        step.decodes.discard(victim.seq_id)
        step.preempted.add(victim.seq_id)
        self.preempt(victim)
