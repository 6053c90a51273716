"""The scheduler: which sequences run in the next step, on how many tokens, in which blocks.

    add -> waiting -> (schedule) running -> (commit) finished
              ^------ preempted, rolled back ------'

`schedule` makes a StepPlan, `add_drafts` may add guessed tokens to it, and `commit` (or, if the forward failed,
`rollback`) ends it. Calls come from one thread. All sequences are ranked by the policy: first come first served, by
priority, or by what their users were served. A step walks down that order; whoever lacks blocks takes them from the last
in order, so the first always advances and all finish.

The next plan can be made before anybody knows what this one sampled: see `UnderWay`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Container, Mapping
from collections.abc import Sequence as AbstractSequence

from ..base.errors import InvalidArgument, QueueFull
from .held import HeldSequences
from .host_tier import HostTier
from .intake import Deadlines, check_request
from .media import EncoderBudget
from .plan import StepPlan
from .planner import Counts, Planner
from .policies import make_policy
from .queues import Queues
from .request import Request, Sequence, SequenceStatus
from .tables import BlockTables, GroupSpec
from .under_way import UnderWay
from .upkeep import SchedulerUpkeep

__all__ = ["GroupSpec", "Scheduler"]


class Scheduler(SchedulerUpkeep):
    """Continuous batching over paged blocks.

    Args:
        groups: the block groups, by what their layers see.
        block_size: tokens per block.
        num_blocks: per group, blocks to begin with.
        max_blocks: per group, blocks it may grow to.
        max_batch_tokens: token budget of a step.
        max_num_seqs: most running sequences.
        max_model_len: most tokens of a sequence, prompt and output.
        max_slots: most states of sequences at a time; 0 if the model keeps no state.
        whole_prompts: compute every prompt in one step, even where it exceeds the token budget: for layers whose state
            can only be taken up by a single token. Not for sliding groups, which could not hold it.
        prefix_cache: share blocks of equal prefixes; not for models that keep a state.
        policy: "fcfs", "priority" or "fair"; see `core.policies`.
        max_queue: most sequences waiting; `add` raises QueueFull beyond. None: unbounded.
        encoder: what a step may have encoded of the requests' media; None: they have none, or nobody counts.
        clock: nanoseconds; what "priority" tells the time by.
        host: host memory for evicted prefixes and preempted sequences. None: there is none.

    Attributes:
        requests: unfinished requests by id.
        whole_prompts: as above.
        held: sequences that somebody else drives on the same blocks.
    """

    def __init__(
        self,
        *,
        groups: AbstractSequence[GroupSpec],
        block_size: int,
        num_blocks: list[int],
        max_blocks: list[int],
        max_batch_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        max_slots: int = 0,
        whole_prompts: bool = False,
        prefix_cache: bool = True,
        policy: str = "fcfs",
        max_queue: int | None = None,
        encoder: EncoderBudget | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        host: HostTier | None = None,
    ):
        assert max_batch_tokens >= 1 and max_num_seqs >= 1
        assert not whole_prompts or all(group.window is None for group in groups)
        self.max_batch_tokens = max_batch_tokens
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.max_queue = max_queue
        self.whole_prompts = whole_prompts
        self.requests: dict[str, Request] = {}
        self._prefix_cache = prefix_cache
        self._policy = make_policy(policy, clock)
        self._tables = BlockTables(groups, block_size, num_blocks, max_blocks, prefix_cache, max_slots, host)
        self._queues = Queues(self._policy)
        self._counts = Counts()
        self._planner = Planner(
            self._tables,
            self._queues,
            self._counts,
            max_batch_tokens=max_batch_tokens,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            whole_prompts=whole_prompts,
            encoder=encoder,
            new_sequence=self._new_sequence,
            held_blocks=lambda: self.held.holds_blocks,
            empty_held=lambda: self.held.empty_one(),
            empty_pinned=lambda: self.held.empty_pinned(),
        )
        self.held = HeldSequences(
            self._tables, new_id=self._take_id, new_step=self._take_step, make_room=self._planner.preempt_last
        )
        self._sequences: dict[int, Sequence] = {}
        self._ended: dict[int, Sequence] = {}  # of requests dropped since the last `schedule`
        self._deadlines = Deadlines(self.requests)
        self._next_seq_id = 0
        self._num_steps = 0
        self._under_way = UnderWay(
            self._sequences,
            self._tables,
            self._planner,
            self._counts,
            self._policy,
            end=self._end,
            max_model_len=max_model_len,
        )

    # -- requests in

    def add(self, request: Request) -> None:
        """Queue `request`.

        Raises:
            InvalidArgument: an empty prompt, an n above max_num_seqs, an id that is in use.
            RequestTooLarge: it could never run.
            QueueFull: `max_queue` sequences wait already.
        """
        if request.request_id in self.requests:
            raise InvalidArgument(f"request_id {request.request_id!r} is in use")
        self.check(request)
        self.check_room()
        seq_id = self._take_id(request.n)
        self._policy.enter(request)
        leader = self._new_sequence(request, 0, seq_id)
        leader.pending_forks = request.n - 1
        self.requests[request.request_id] = request
        self._deadlines.add(request, seq_id)
        self._queues.wait(leader)

    def check(self, request: Request) -> None:
        """Raise InvalidArgument or RequestTooLarge, as `add` does, unless `request` is one that can run."""
        check_request(
            request,
            self._tables,
            max_batch_tokens=self.max_batch_tokens,
            max_num_seqs=self.max_num_seqs,
            max_model_len=self.max_model_len,
        )

    def check_room(self, count: int = 1) -> None:
        """Raise QueueFull unless `count` more requests may wait."""
        if self.max_queue is not None and self.num_waiting + count > self.max_queue:
            raise QueueFull(f"{self.num_waiting} sequences are waiting already (max_queue is {self.max_queue})")

    def _take_id(self, count: int = 1) -> int:
        """The first of `count` consecutive ids that nobody has."""
        self._next_seq_id += count
        return self._next_seq_id - count

    def _take_step(self) -> int:
        self._num_steps += 1
        return self._num_steps

    # -- one step

    def schedule(self, only: Container[int] | None = None) -> StepPlan | None:
        """Plan the next step, or None if nothing can run.

        With `only`, no other sequence ids run; others may lose their blocks so that these can. A plan that was
        neither launched nor committed nor rolled back (an interrupt came between) is rolled back first. Of launched
        plans there may be one.
        """
        self._under_way.take_back()
        self._ended.clear()
        plan = self._under_way.pack(self._num_steps + 1, self._planner.plan(only))
        if plan is not None:
            self._take_step()
        return plan

    def draftable(self) -> tuple[int, list[tuple[Sequence, int]]]:
        """What the plan just made has room for: (draft tokens in all, [(sequence, most draft tokens)])."""
        assert not self.has_state, "a state cannot be taken back by the drafts that were wrong"
        return self._under_way.draftable()

    def add_drafts(self, drafts: Mapping[int, list[int]], *, certain: bool = False) -> StepPlan:
        """Let the plan just made compute draft tokens too, within what `draftable` says; returns the new plan.

        They take only what is left when everything else is planned: a sequence may get fewer, or none, for want of
        blocks.

        Args:
            certain: they are no guesses, and counted as `forced_tokens`.
        """
        own = {self._sequences[seq_id]: tokens for seq_id, tokens in drafts.items()}
        return self._under_way.add_drafts(own, certain)

    def launched(self, plan: StepPlan) -> None:
        """The step of `plan` has begun: its sequences go on as if it were done, by a token each that is still unknown.

        With draft tokens it must be committed before the next `schedule`, as nobody knows how many of them are right.
        """
        self._under_way.launched(plan)

    def commit(self, plan: StepPlan, tokens: Mapping[int, list[int]]) -> list[Sequence]:
        """The step of `plan`, the oldest, was computed. Appends the sampled tokens and ends the sequences they finish, and
        those of prompts that are all computed and want no tokens.

        It includes `launched`, if that was not called.

        Args:
            tokens: seq_id -> its next tokens: the sampled one, before it the draft tokens that were found right. A
                sequence whose sampling failed at once is left out: `finish` or `abort` it now.

        Returns:
            The sequences that got tokens, as many as until one finished them, and those that wanted none and ended. Those
            ended since `schedule` are passed over.
        """
        return self._under_way.commit(plan, tokens)

    def rollback(self, plan: StepPlan) -> None:
        """The step of `plan`, the newest, failed: its sequences lose all their blocks and wait again, in order.

        Blocks the step was to fill leave the prefix cache; those of earlier steps stay. Siblings forked by the plan
        remain and compute the prompt for themselves (from the prefix cache, as a rule). Not counted as preemption.
        """
        self._under_way.rollback(plan)

    def take_back(self) -> None:
        """Roll back every plan that is under way."""
        self._under_way.take_back(launched=True)

    # -- ends

    def finish(self, seq_id: int, reason: str, stop_reason: int | str | None = None) -> None:
        """End one sequence now. Nothing happens if it has ended already.

        Ending a leader that has not forked yet ends its siblings with it.
        """
        seq = self._sequences.get(seq_id)
        if seq is not None and seq.status is not SequenceStatus.FINISHED:
            self._end(seq, reason, stop_reason)

    def cut(self, seq_id: int, num_output: int, reason: str, stop_reason: int | str | None = None) -> None:
        """End a sequence of the last commit after `num_output` output tokens, whatever the later ones brought."""
        seq = self.sequence(seq_id)
        del seq.token_ids[seq.num_prompt + num_output :]
        if seq.status is SequenceStatus.FINISHED:
            seq.finish_reason, seq.stop_reason = reason, stop_reason
        else:
            self._end(seq, reason, stop_reason)

    def abort(self, request_id: str) -> bool:
        """End all sequences of a request with reason "abort". False if there is no such unfinished request."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        for seq in list(request.sequences):
            self.finish(seq.seq_id, "abort")
        return True

    def expired(self, now: float) -> list[Request]:
        """Unfinished requests whose deadline has passed at `now` (`time.monotonic` clock). They go on until ended."""
        return self._deadlines.expired(now)

    def _end(self, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """Finish `seq`, free what it held, drop the request if it was its last."""
        request = seq.request
        self._queues.remove(seq)
        self._tables.release(seq)
        seq.num_unknown = 0
        siblings = [self._new_sequence(request, index, seq.seq_id + index) for index in range(1, seq.seats)]
        seq.pending_forks = 0
        for ended in [seq, *siblings]:
            ended.status, ended.finish_reason, ended.stop_reason = SequenceStatus.FINISHED, reason, stop_reason
        if request.finished:
            del self.requests[request.request_id]
            self._policy.leave(request)
            for ended in request.sequences:
                self._ended[ended.seq_id] = self._sequences.pop(ended.seq_id)

    def _new_sequence(self, request: Request, index: int, seq_id: int) -> Sequence:
        seq = Sequence(seq_id, request, index, self._policy.order(request, seq_id), len(self._tables.pools))
        request.sequences.append(seq)
        self._sequences[seq_id] = seq
        return seq

    # -- looking in

    @property
    def has_state(self) -> bool:
        """Whether sequences keep a recurrent state: it follows every fork, but cannot be taken back by some tokens."""
        return self._tables.has_state

    @property
    def max_blocks(self) -> list[int]:
        """Blocks that each group may have."""
        return self._tables.max_blocks

    @property
    def max_slots(self) -> int:
        """States of sequences there may be at a time; 0 if the model keeps none."""
        return self._tables.slots.max_blocks

    @property
    def num_waiting(self) -> int:
        """Sequences waiting; a request that has not forked yet counts once."""
        return len(self._queues.waiting)

    @property
    def num_running(self) -> int:
        return len(self._queues.running)

    def has_unfinished(self) -> bool:
        return bool(self.requests)

    @property
    def reads_disk(self) -> bool:
        """Whether sequences wait for blocks that are read from a disk."""
        return self._tables.reads

    def is_request_finished(self, request_id: str) -> bool:
        """Whether all its sequences have ended (or it was never added)."""
        return request_id not in self.requests

    def users_of(self, adapter: int) -> int:
        """Unfinished requests, and held sequences, with this `Request.adapter`."""
        requests = [*self.requests.values(), *(sequence.request for sequence in self.held)]
        return sum(request.adapter == adapter for request in requests)

    def sequence(self, seq_id: int) -> Sequence:
        """A sequence of an unfinished request, or of one that ended since the last `schedule`; else KeyError."""
        seq = self._sequences.get(seq_id)
        return self._ended[seq_id] if seq is None else seq

    def unfinished(self, seq_id: int) -> Sequence | None:
        """A sequence that has not ended; None if it has."""
        seq = self._sequences.get(seq_id)
        return None if seq is None or seq.status is SequenceStatus.FINISHED else seq

    def stats(self) -> dict:
        """Counts since `reset_stats`, and the state now. Lists have one entry per group, in blocks."""
        pools, slots = self._tables.pools, self._tables.slots
        return {
            "waiting": len(self._queues.waiting),
            "running": len(self._queues.running),
            "blocks_in_use": [pool.num_in_use for pool in pools],
            "blocks_total": [pool.max_blocks for pool in pools],
            "blocks_peak": [pool.peak_in_use for pool in pools],
            "slots_in_use": slots.num_in_use,
            "slots_total": slots.max_blocks,
            "slots_peak": slots.peak_in_use,
            **dataclasses.asdict(self._counts),
            **self._policy.stats(),
        }

    def reset_stats(self) -> None:
        """Start the counters and the peak anew."""
        self._counts.reset()
        for pool in [*self._tables.pools, self._tables.slots]:
            pool.reset_peak()

    def check_integrity(self) -> None:
        """Raise AssertionError unless queues, seats, tables, state slots, reference counts and published keys agree."""
        live = [seq for request in self.requests.values() for seq in request.sequences]
        assert {id(seq) for seq in live} == {id(seq) for seq in self._sequences.values()}, "sequences got lost"
        assert not any(request.finished for request in self.requests.values()), "a finished request was kept"
        self._queues.check_integrity([seq for seq in live if seq.status is not SequenceStatus.FINISHED])
        assert self._queues.seats_used <= self.max_num_seqs, "too many sequences run"
        live += self.held
        num_tokens = {seq.seq_id: seq.num_computed for seq in live}
        self._under_way.check_integrity(num_tokens)
        self._tables.check_integrity(live, num_tokens)
