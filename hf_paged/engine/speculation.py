"""Speculative decoding: guess a sequence's next tokens, compute them in one step, keep what would have been sampled.

A draw depends on the request's seed, the position and the logits only. So every row of a step that carries draft tokens
is sampled as if the drafts before it were the output, and a sequence gets the sampled tokens up to the first that is
not what was guessed: exactly those it would have got one step at a time, whatever was guessed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Protocol

from ..core.lookup import PromptLookup
from ..core.plan import StepPlan
from ..core.request import Sequence
from ..core.scheduler import Scheduler
from ..runtime.sampler import SampleRow

# Draft tokens only fill a step up to this many. On a CPU the weights are read once for a few rows at the price of one,
# beyond that every row costs; accelerators have more to spare.
MAX_STEP_TOKENS = {"cpu": 32}
MAX_STEP_TOKENS_ELSEWHERE = 256
_MAX_DOUBLINGS = 4  # the longest pause is 15 steps


class Proposer(Protocol):
    """Where guesses come from."""

    def propose(self, jobs: list[tuple[Sequence, SampleRow, int]]) -> list[list[int]]:
        """Guesses for every (sequence, its row in the sampler, how many at most); fewer or none where it knows no more."""
        ...

    def forget(self, seq_id: int) -> None:
        """The sequence has ended."""
        ...

    def sleep(self) -> None:
        """Give memory back until the next proposal."""
        ...

    def close(self) -> None: ...


class NgramProposer:
    """Guesses that a sequence repeats what it, or its prompt, said before."""

    def __init__(self, shortest: int, longest: int):
        self._lengths = shortest, longest
        self._lookups: dict[int, PromptLookup] = {}

    def propose(self, jobs: list[tuple[Sequence, SampleRow, int]]) -> list[list[int]]:
        guesses = []
        for sequence, _, count in jobs:
            lookup = self._lookups.get(sequence.seq_id)
            if lookup is None:
                lookup = self._lookups[sequence.seq_id] = PromptLookup(*self._lengths)
            guesses.append(lookup.guess(sequence.token_ids, count))
        return guesses

    def forget(self, seq_id: int) -> None:
        self._lookups.pop(seq_id, None)

    def sleep(self) -> None:
        pass  # what it keeps is small

    def close(self) -> None:
        self._lookups.clear()


@dataclass(slots=True)
class Pace:
    """How many tokens to guess for one sequence, by how the last guesses went.

    All right: twice as many next time. Some right: one more than that. None right: one, after a pause that doubles
    with every failure in a row, so a sequence that cannot be guessed costs next to nothing.
    """

    most: int
    count: int
    failures: int = 0
    pause: int = 0

    def next(self) -> int:
        """Tokens to guess in this step."""
        if self.pause:
            self.pause -= 1
            return 0
        return self.count

    def learn(self, num_drafts: int, num_accepted: int) -> None:
        if not num_accepted:
            self.count, self.pause = 1, 2**self.failures - 1
            self.failures = min(self.failures + 1, _MAX_DOUBLINGS)
            return
        self.failures = 0
        if num_accepted < num_drafts:
            self.count = num_accepted + 1
        else:  # it may have been fewer than wanted
            self.count = min(self.most, max(self.count, 2 * num_accepted))


class Speculator:
    """Adds draft tokens to plans: whose, how many, and whose no more.

    Args:
        proposer: where the guesses come from.
        num_tokens: most guesses for one sequence in a step.
        max_step_tokens: no guess is added to a step beyond so many tokens in all.
    """

    def __init__(self, proposer: Proposer, *, num_tokens: int, max_step_tokens: int):
        self._proposer = proposer
        self._num_tokens = num_tokens
        self._max_step_tokens = max_step_tokens
        self._paces: dict[int, Pace] = {}
        self._barred: set[int] = set()
        self._trust = Pace(most=1, count=1)  # in the proposer: one that raises is asked less and less often
        self._warned = False

    def extend(self, plan: StepPlan, scheduler: Scheduler) -> StepPlan:
        """The plan in flight, with draft tokens where there is room and hope."""
        budget, candidates = scheduler.draftable()
        budget = min(budget, self._max_step_tokens - plan.num_tokens)
        if budget < 1:
            return plan
        allowed = [(sequence, most) for sequence, most in candidates if self._may(sequence)]
        counts = share(budget, [min(most, self._pace(sequence).next()) for sequence, most in allowed])
        jobs = [
            (sequence, sequence.request.state.sequence_state(sequence).row, count)
            for (sequence, _), count in zip(allowed, counts, strict=True)
            if count
        ]
        guesses = self._ask(jobs)
        drafts = {sequence.seq_id: guess for (sequence, _, _), guess in zip(jobs, guesses, strict=True) if guess}
        return scheduler.add_drafts(drafts) if drafts else plan

    def _ask(self, jobs: list[tuple[Sequence, SampleRow, int]]) -> list[list[int]]:
        """The proposer's guesses. It may fail; no request suffers from that."""
        if not jobs or not self._trust.next():
            return [[] for _ in jobs]
        try:
            guesses = self._proposer.propose(jobs)
        except Exception as error:
            self._trust.learn(1, 0)
            if not self._warned:
                self._warned = True
                message = f"speculation: no tokens could be guessed ({error!r}); requests go on without"
                warnings.warn(message, stacklevel=2)
            return [[] for _ in jobs]
        self._trust.learn(1, 1)
        return guesses

    def learn(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        """A step found so many of so many guesses right."""
        if num_drafts:
            self._pace(sequence).learn(num_drafts, num_accepted)

    def bar(self, plan: StepPlan) -> bool:
        """A step failed: guess no more for those it guessed for, lest that is why. False if it guessed for nobody."""
        guessed = [seq_id for seq_id, drafts in zip(plan.seq_ids, plan.num_drafts, strict=True) if drafts]
        self._barred.update(guessed)
        return bool(guessed)

    def forget(self, seq_id: int) -> None:
        """The sequence has ended."""
        self._paces.pop(seq_id, None)
        self._barred.discard(seq_id)
        self._proposer.forget(seq_id)

    def sleep(self) -> None:
        """Give memory back until the next guess. Raises CacheFull where `BatchEngine.sleep` does."""
        self._proposer.sleep()

    def close(self) -> None:
        self._proposer.close()

    def _may(self, sequence: Sequence) -> bool:
        return sequence.request.state.hooks.draftable and sequence.seq_id not in self._barred

    def _pace(self, sequence: Sequence) -> Pace:
        pace = self._paces.get(sequence.seq_id)
        if pace is None:
            pace = self._paces[sequence.seq_id] = Pace(self._num_tokens, (self._num_tokens + 1) // 2)
        return pace


def share(budget: int, wanted: list[int]) -> list[int]:
    """Deal `budget` out one by one: everybody's first guess before anybody's second, which is less likely right."""
    given = [0] * len(wanted)
    while budget:
        open_ = [index for index, count in enumerate(wanted) if given[index] < count][:budget]
        if not open_:
            break
        for index in open_:
            given[index] += 1
        budget -= len(open_)
    return given
