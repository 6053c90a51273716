"""Plans under way: made, launched, and neither committed nor rolled back yet.

The next plan can be made before anybody knows what this one sampled: from `launched` on its sequences have a token more
whose value is unknown. Lengths are known ahead, so nobody is planned beyond them. Who turns out to have ended in
another way computes one row for nothing, and writes it into blocks that are free by then. That harms nobody, as steps
run in the order of their plans: whoever gets these blocks writes them later, and reads of them only what it wrote or
what a key promises, and no block gets a key for an unknown token.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .plan import StepPlan
from .planner import Counts, Planner
from .policy import Policy
from .request import Sequence, SequenceStatus, append_tokens
from .step import StepBuilder
from .tables import BlockTables


@dataclass(slots=True, eq=False)
class _Step:
    """A plan, how it was made, and ids of the sequences that got an unknown token when it was launched."""

    plan: StepPlan
    builder: StepBuilder
    awaiting: list[int] = field(default_factory=list)

    @property
    def places(self) -> dict[int, int]:
        """By seq_id, the place of its token among the plan's samples."""
        return {seq_id: place for place, (_, seq_id) in enumerate(self.plan.samples)}


class UnderWay:
    """The plans of one scheduler that are under way: at most one planned, and one launched; for a moment two.

    Args:
        sequences: the scheduler's unfinished sequences by id.
        end: `end(sequence, reason, stop_reason)` finishes one.
    """

    def __init__(
        self,
        sequences: Mapping[int, Sequence],
        tables: BlockTables,
        planner: Planner,
        counts: Counts,
        policy: Policy,
        *,
        end: Callable[[Sequence, str, int | None], None],
        max_model_len: int,
    ):
        self._sequences = sequences
        self._tables = tables
        self._planner = planner
        self._counts = counts
        self._policy = policy
        self._end = end
        self._max_model_len = max_model_len
        self._planned: _Step | None = None
        self._launched: deque[_Step] = deque()  # oldest first

    # -- a plan is made

    def pack(self, number: int, builder: StepBuilder) -> StepPlan | None:
        """The plan of what `builder` collected; None if nothing runs."""
        assert self._planned is None, "the plan before this one was not run"
        assert len(self._launched) <= 1, "a plan refers only to what the plan before it samples"
        plan = builder.pack(number, self._tables, self._launched[0].places if self._launched else {})
        if plan is not None:
            self._planned = _Step(plan, builder)
        return plan

    def draftable(self) -> tuple[int, list[tuple[Sequence, int]]]:
        """See `Scheduler.draftable`."""
        assert not self._launched, "guesses follow known tokens"
        builder = self._planned.builder
        return builder.budget, builder.draftable(self._max_model_len)

    def add_drafts(self, drafts: Mapping[Sequence, list[int]], certain: bool) -> StepPlan:
        """See `Scheduler.add_drafts`."""
        step = self._planned
        for seq, tokens in drafts.items():
            count = self._tables.extend_for_drafts(seq, seq.num_computed + 1, len(tokens))
            if count:
                step.builder.add_drafts(seq, tokens[:count], certain)
        assert step.builder.budget >= 0, "more drafts than draftable() allows"
        if step.builder.drafts:
            step.plan = step.builder.pack(step.plan.step, self._tables, {})
        return step.plan

    # -- and ends

    def launched(self, plan: StepPlan) -> None:
        """See `Scheduler.launched`."""
        step = self._planned
        assert step is not None and step.plan is plan, "not the plan that schedule() made last"
        for seq_id, new, drafts in zip(plan.seq_ids, plan.num_new, plan.num_drafts, strict=True):
            seq = self._running(seq_id)
            if seq is not None:
                seq.num_computed += new - drafts
        for sibling in step.builder.forked:
            if sibling.status is SequenceStatus.RUNNING:
                sibling.num_computed = len(sibling.token_ids)
        for seq_id in dict.fromkeys(seq_id for _, seq_id in plan.samples):
            seq = self._running(seq_id)
            if seq is not None:
                seq.num_unknown += 1
                step.awaiting.append(seq_id)
        self._planned = None
        self._launched.append(step)

    def commit(self, plan: StepPlan, tokens: Mapping[int, list[int]]) -> list[Sequence]:
        """See `Scheduler.commit`."""
        if self._planned is not None and self._planned.plan is plan:
            self.launched(plan)
        assert self._launched and self._launched[0].plan is plan, "not the plan that is due: the oldest comes first"
        step = self._launched.popleft()
        self._tables.settle_moves(plan.step)
        drafts, advanced = step.builder.drafts, []
        for seq in self._known_now(step):
            num_known, taken = len(seq.token_ids), tokens.get(seq.seq_id, [])
            verdict = append_tokens(seq, taken, self._max_model_len)
            if seq.seq_id in drafts:
                num_accepted = min(max(len(taken) - 1, 0), len(seq.token_ids) - num_known)
                self._tables.settle_drafts(seq, num_known, max(num_known, len(seq.token_ids) - 1))
                if seq.seq_id in step.builder.certain:
                    self._counts.forced_tokens += num_accepted
                else:
                    self._count_drafts(seq, len(drafts[seq.seq_id]), num_accepted)
            if taken:
                advanced.append(seq)
                self._policy.output(seq.request, len(seq.token_ids) - num_known)
            if verdict is not None:
                self._end(seq, *verdict)
            elif taken and seq.num_computed == len(seq.token_ids):  # by the step launched since
                self._tables.publish_known(seq, self._launched[0].builder.changes)
        return advanced + self._end_prompts(plan)

    def rollback(self, plan: StepPlan) -> None:
        """See `Scheduler.rollback`."""
        step = self._planned or self._launched[-1]
        assert step.plan is plan, "not the plan that schedule() made last: the newest is rolled back first"
        if self._planned is None:
            self._launched.pop()
        self._planned = None
        step.builder.changes.unpublish()
        self._tables.take_back_moves(plan.step)
        self._known_now(step)
        for seq in [self._running(seq_id) for seq_id in plan.seq_ids] + step.builder.forked:
            if seq is not None and seq.status is SequenceStatus.RUNNING:
                self._planner.send_back(seq)

    def take_back(self, *, launched: bool = False) -> None:
        """Roll back a plan that was not launched, and those that were, too."""
        if self._planned is not None:
            self.rollback(self._planned.plan)
        while launched and self._launched:
            self.rollback(self._launched[-1].plan)

    def check_integrity(self, num_tokens: dict[int, int]) -> None:
        """Raise AssertionError unless the unknown tokens are those of launched plans.

        Args:
            num_tokens: by seq_id, tokens its block tables cover; changed for those of the plan not launched yet.
        """
        awaiting = Counter(seq_id for step in self._launched for seq_id in step.awaiting)
        for seq_id, seq in self._sequences.items():
            expected = 0 if seq.status is SequenceStatus.FINISHED else awaiting[seq_id]
            assert seq.num_unknown == expected, f"{seq} has {seq.num_unknown} unknown tokens, not {expected}"
        if self._planned is None:
            return
        plan = self._planned.plan
        for seq_id, new, context in zip(plan.seq_ids, plan.num_new, plan.num_context, strict=True):
            if self._running(seq_id) is not None:
                num_tokens[seq_id] = context + new
        for seq in self._planned.builder.forked:
            if seq.status is SequenceStatus.RUNNING:
                num_tokens[seq.seq_id] = len(seq.token_ids)

    # -- private

    def _running(self, seq_id: int) -> Sequence | None:
        seq = self._sequences.get(seq_id)
        return seq if seq is not None and seq.status is SequenceStatus.RUNNING else None

    def _end_prompts(self, plan: StepPlan) -> list[Sequence]:
        """End the sequences that want no tokens and whose prompt `plan`, which was computed, completed."""
        ended = []
        for seq_id, new, context in zip(plan.seq_ids, plan.num_new, plan.num_context, strict=True):
            seq = self._running(seq_id)
            if seq is not None and not seq.request.max_tokens and context + new == seq.num_prompt:
                self._end(seq, "stop", None)
                ended.append(seq)
        return ended

    def _known_now(self, step: _Step) -> list[Sequence]:
        """Nobody waits for the tokens of `step` any more. Returns who did, but for those that have ended."""
        waited = [self._sequences.get(seq_id) for seq_id in step.awaiting]
        waited = [seq for seq in waited if seq is not None and seq.status is not SequenceStatus.FINISHED]
        for seq in waited:
            seq.num_unknown -= 1
        return waited

    def _count_drafts(self, seq: Sequence, num_drafts: int, num_accepted: int) -> None:
        seq.num_draft_tokens += num_drafts
        seq.num_accepted_tokens += num_accepted
        self._counts.draft_tokens += num_drafts
        self._counts.accepted_tokens += num_accepted
