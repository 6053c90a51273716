"""Whole sequences in one packed batch, equal beginnings once: what a trainer's forward over finished sequences is."""

from __future__ import annotations

from collections.abc import Sequence

from .plan import StepPlan


class WholeSequences:
    """Sequences of tokens on blocks of their own.

    What several of them begin with is computed once, in whole blocks: the completions of a prompt share all of it but
    its last few tokens.

    Args:
        stateful: the model keeps a state per sequence, in a slot of its own; then nothing is shared.

    Attributes:
        rows: the place of every sequence's every token in the packed batch.
        owners: of every sequence of the batch, which of those added it is; one that adds no token is none of the batch.
    """

    def __init__(self, block_size: int, *, stateful: bool = False):
        self._block_size = block_size
        self._stateful = stateful
        self._blocks: dict[tuple[int, tuple[int, ...]], int] = {}  # (block before it, its tokens) -> block
        self._first_rows: list[int] = []  # of every block the packed row of its first token
        self._tokens: list[int] = []
        self._tables: list[list[int]] = []
        self._contexts: list[int] = []
        self._counts: list[int] = []
        self.rows: list[list[int]] = []
        self.owners: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def cost(self, tokens: Sequence[int]) -> int:
        """How many tokens `add` would put into the batch."""
        return len(tokens) - self._block_size * len(self._known(tokens))

    def add(self, tokens: Sequence[int]) -> None:
        table, size = self._known(tokens), self._block_size
        context = len(table) * size
        for begin in range(context, len(tokens), size):
            mine = tuple(tokens[begin : begin + size])
            block, before = len(self._first_rows), table[-1] if table else -1
            self._first_rows.append(len(self._tokens))
            if len(mine) == size and not self._stateful:
                self._blocks[before, mine] = block
            self._tokens += mine
            table.append(block)
        if context < len(tokens):
            self._tables.append(table)
            self._contexts.append(context)
            self._counts.append(len(tokens) - context)
            self.owners.append(len(self.rows))
        self.rows.append([self._first_rows[table[place // size]] + place % size for place in range(len(tokens))])

    def _known(self, tokens: Sequence[int]) -> list[int]:
        """The blocks that hold its beginning already."""
        table: list[int] = []
        for end in range(self._block_size, len(tokens) + 1, self._block_size):
            key = table[-1] if table else -1, tuple(tokens[end - self._block_size : end])
            if key not in self._blocks:
                break
            table.append(self._blocks[key])
        return table

    def plan(self, num_groups: int) -> StepPlan:
        """The batch, in which every block group has the same tables."""
        counts = self._counts
        return StepPlan(
            step=1,
            seq_ids=list(range(len(counts))),
            num_new=counts,
            num_drafts=[0] * len(counts),
            num_context=self._contexts,
            token_ids=self._tokens,
            block_tables=[self._tables] * num_groups,
            copies=[[]] * num_groups,
            num_blocks=[len(self._first_rows)] * num_groups,
            states=[(-1, slot) for slot in range(len(counts))] if self._stateful else [],
            num_slots=len(counts) if self._stateful else 0,
            samples=[],
        )
