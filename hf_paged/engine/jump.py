"""Jumping ahead: what a request's form leaves no choice about is computed in one step, instead of a step for each token.

After the jump-forward decoding of SGLang (Zheng et al., 2024). The tokens ride in the plan as guesses do, and are sampled as
guesses are: so log-probabilities, stops and everything else are those of a step each. They are never wrong, as the form
leaves nothing else wherever it is asked (`Constraint.forced`); what may come in between is the output's end.
"""

from __future__ import annotations

from ..core.plan import StepPlan
from ..core.scheduler import Scheduler
from .request_state import RequestState


class JumpAhead:
    """Adds such tokens to plans.

    Attributes:
        jumping: ids of the sequences of the last plan that have some.
    """

    def __init__(self):
        self._num_forms = 0
        self._barred: set[int] = set()
        self.jumping: frozenset[int] = frozenset()

    @property
    def wanted(self) -> bool:
        """Whether any request has a form."""
        return self._num_forms > 0

    def admitted(self, state: RequestState) -> None:
        """A request has come."""
        self._num_forms += state.constraint is not None

    def forget(self, state: RequestState) -> None:
        """It has ended."""
        if state.constraint is not None:
            self._num_forms -= 1
            self._barred.difference_update(sequence.seq_id for sequence in state.request.sequences)

    def extend(self, plan: StepPlan, scheduler: Scheduler) -> StepPlan:
        """The plan just made, with what has to follow. No other may be under way."""
        self.jumping = frozenset()
        if not self.wanted or scheduler.has_state:
            return plan
        budget, candidates = scheduler.draftable()
        found: dict[int, list[int]] = {}
        for sequence, most in candidates:
            state: RequestState = sequence.request.state
            if state.constraint is None or not state.hooks.draftable or sequence.seq_id in self._barred:
                continue
            row = state.sequence_state(sequence).row
            tokens = row.constraint.forced(row.token_ids[row.num_prompt :], min(most, budget))
            if tokens:
                found[sequence.seq_id] = tokens
                budget -= len(tokens)
        if not found:
            return plan
        self.jumping = frozenset(found)
        return scheduler.add_drafts(found, certain=True)

    def bar(self, plan: StepPlan) -> bool:
        """A step failed: no more of this for those that had some, lest that is why. False if nobody had."""
        had = [seq_id for seq_id, count in zip(plan.seq_ids, plan.num_drafts) if count and seq_id in self.jumping]
        self._barred.update(had)
        return bool(had)
