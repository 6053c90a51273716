"""Who goes before the first in line, because the prefix cache holds more of its prompt.

After SGLang's longest-prefix-match order (Zheng et al., SGLang: Efficient Execution of Structured Language Model Programs,
NeurIPS 2024): requests with the same prefix are admitted together, while it is there. Here nobody is overtaken by more
than `reach` others of its kind (`Policy.kind`), and a step looks up no more than so many prompts of a kind, however many
wait.
"""

from __future__ import annotations

from .policy import Policy
from .request import Sequence, SequenceStatus
from .step import StepBuilder
from .tables import BlockTables


class Overtaking:
    """Chooses among the next in line.

    Args:
        reach: how many places, and how many requests that come later, one may get ahead.
    """

    def __init__(self, tables: BlockTables, policy: Policy, reach: int):
        self._tables, self._policy, self._reach = tables, policy, reach

    def choose(self, step: StepBuilder, head: Sequence, before: tuple[int, int] | None) -> Sequence:
        """`head`, or the one to be tried in its place.

        Args:
            before: nobody of a higher order.
        """
        if not self._tables.prefix_cache:
            return head
        kind = self._policy.kind(head.request)
        ranked = step.ranked.get(kind)
        if ranked is None:
            ranked = step.ranked[kind] = self._rank(step, head)
        while ranked and ranked[-1][1].status is not SequenceStatus.WAITING:
            ranked.pop()
        if not ranked:
            return head
        cached, seq = ranked[-1]
        if before is not None and seq.order > before or seq.seq_id > head.seq_id + self._reach:
            return head
        if seq.seq_id in step.preempted or cached <= self._tables.num_cached(head):
            return head
        ranked.pop()  # once a step
        return seq

    def _rank(self, step: StepBuilder, head: Sequence) -> list[tuple[int, Sequence]]:
        """(cached blocks, sequence) of those near `head` with any, the most and the first to come at the end."""
        near = step.walk.near(self._reach)
        if step.only is not None:
            near = [seq for seq in near if step.may_run(seq)]
        num_cached = self._tables.num_cached
        found = [(cached, seq) for seq in near if (cached := num_cached(seq)) and not seq.num_unknown]
        found.sort(key=lambda entry: (entry[0], -entry[1].seq_id))
        return found
