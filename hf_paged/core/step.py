"""A step while it is being planned: the budget left, who runs, and the packing into a StepPlan."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping

from .media import MediaRows, media_rows
from .plan import StepPlan
from .policy import Walk
from .request import Sequence
from .tables import BlockTables, TableChanges


class StepBuilder:
    """Collects what one step computes.

    Attributes:
        budget: tokens that may still be scheduled.
        only: sequence ids that may run; None for all.
        decodes: running sequences with one token to compute whose turn is still to come; each has one token of the
            budget reserved.
        busy: sequences that run in this step or were forked in it; they are not preempted.
        preempted: sequences preempted while planning; they are not admitted again at once.
        prefills: (sequence, tokens in the cache after the step) of prompts that need further steps.
        forked: siblings that come into being with this step.
        level: the lowest of those whose prompts it computes (`Policy.level`).
        walk: the step's way along the waiting sequences; None until there is one.
        ranked: by kind of request, what `Overtaking` found out.
        admitting: whether further waiting sequences may be looked at.
        changes: what happened to the block pools.
        drafts: seq_id -> its draft tokens.
        certain: those of `drafts` whose tokens are no guesses.
        number: of the plan, once it is packed.
    """

    __slots__ = (
        "_entries",
        "admitting",
        "budget",
        "busy",
        "certain",
        "changes",
        "decodes",
        "drafts",
        "forked",
        "level",
        "number",
        "only",
        "preempted",
        "prefills",
        "ranked",
        "walk",
    )

    def __init__(self, budget: int, only: Container[int] | None, num_groups: int):
        self.budget = budget
        self.only = only
        self.decodes: set[int] = set()
        self.busy: set[int] = set()
        self.preempted: set[int] = set()
        self.prefills: list[tuple[Sequence, int]] = []
        self.forked: list[Sequence] = []
        self.level = math.inf
        self.walk: Walk | None = None
        self.ranked: dict[object, list[tuple[int, Sequence]]] = {}
        self.admitting = True
        self.changes = TableChanges(num_groups)
        self.drafts: dict[int, list[int]] = {}
        self.certain: set[int] = set()
        self.number: int | None = None
        self._entries: list[tuple[Sequence, int, list[int]]] = []

    @property
    def spare_budget(self) -> int:
        """Tokens a prefill may take: the budget less what the coming decodes need."""
        return self.budget - len(self.decodes)

    def may_run(self, seq: Sequence) -> bool:
        return self.only is None or seq.seq_id in self.only

    def add(self, seq: Sequence, count: int, samples: list[int]) -> None:
        """`seq` computes `count` tokens; the sequences `samples` get a token from the last one's logits.

        A prompt that exceeds the budget takes what is left of it; the tokens reserved for decodes stay theirs.
        """
        self._entries.append((seq, count, samples))
        self.busy.add(seq.seq_id)
        self.budget -= min(count, self.spare_budget)

    def draftable(self, max_model_len: int) -> list[tuple[Sequence, int]]:
        """[(sequence, most draft tokens)] for all that compute one token, sample their next, and have no drafts yet.

        They are as many as it may still output, less the one it samples anyway.
        """
        found = []
        for seq, count, samples in self._entries:
            if count == 1 and samples == [seq.seq_id] and seq.seq_id not in self.drafts:
                room = seq.num_allowed(max_model_len) - 1
                if room > 0:
                    found.append((seq, room))
        return found

    def add_drafts(self, seq: Sequence, drafts: list[int], certain: bool) -> None:
        """`seq`, which is `draftable`, computes these after its token."""
        self.drafts[seq.seq_id] = drafts
        if certain:
            self.certain.add(seq.seq_id)
        self.budget -= len(drafts)

    def pack(self, step: int, tables: BlockTables, places: Mapping[int, int]) -> StepPlan | None:
        """The plan, single tokens before longer chunks; None if nothing runs.

        Args:
            places: by seq_id, the place of its unknown token among the samples of the plan before this one.
        """
        if not self._entries:
            return None
        self.number = step
        entries = [(*entry, self.drafts.get(entry[0].seq_id, ())) for entry in self._entries]
        entries.sort(key=lambda entry: entry[1] + len(entry[3]) > 1)
        token_ids: list[int] = []
        samples: list[tuple[int, int]] = []
        media: list[MediaRows] = []
        for seq, count, seq_ids, drafts in entries:
            start = seq.num_computed
            if seq.request.media:
                media += media_rows(seq, count, len(token_ids))
            if count == 1:
                known = start < len(seq.token_ids)
                token_ids.append(seq.token_ids[start] if known else -1 - places[seq.seq_id])
            else:
                token_ids += seq.token_ids[start : start + count]
            for seq_id in seq_ids:
                samples.append((len(token_ids) - 1, seq_id))
            for token in drafts:
                token_ids.append(token)
                samples.append((len(token_ids) - 1, seq.seq_id))
        sequences = [seq for seq, _, _, _ in entries]
        adapters = [seq.request.adapter for seq in sequences]
        return StepPlan(
            step=step,
            seq_ids=[seq.seq_id for seq in sequences],
            num_new=[count + len(drafts) for _, count, _, drafts in entries],
            num_drafts=[len(drafts) for _, _, _, drafts in entries],
            num_context=[seq.num_computed for seq in sequences],
            token_ids=token_ids,
            block_tables=[[seq.block_tables[group] for seq in sequences] for group in range(len(tables.pools))],
            copies=self.changes.copies,
            num_blocks=[pool.num_blocks for pool in tables.pools],
            states=[self.changes.states[seq.seq_id] for seq in sequences] if tables.has_state else [],
            num_slots=tables.slots.num_blocks,
            samples=samples,
            adapters=adapters if any(adapters) else [],
            media=media,
            moves=self.changes.take_moves(tables.host, step),
        )
