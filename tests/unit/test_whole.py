"""Whole sequences in one packed batch: what they begin with in common is there once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hf_paged.core.whole import WholeSequences


@given(
    sequences=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1, max_size=6),
    stateful=st.booleans(),
)
def test_every_token_has_its_row_and_its_block(sequences, stateful):
    batch = WholeSequences(4, stateful=stateful)
    for tokens in sequences:
        before, cost = batch.num_tokens, batch.cost(tokens)
        batch.add(tokens)
        assert batch.num_tokens == before + cost
    plan = batch.plan(2)
    assert sum(plan.num_new) == plan.num_tokens == batch.num_tokens and len(batch) == len(sequences)
    for tokens, rows in zip(sequences, batch.rows, strict=True):
        assert [plan.token_ids[row] for row in rows] == tokens
    slots, start = {}, 0  # slot -> packed row that writes it
    for owner, context, count, table in zip(batch.owners, plan.num_context, plan.num_new, plan.block_tables[1], strict=True):
        assert context % 4 == 0 and context + count == len(sequences[owner])
        for place in range(context, context + count):
            slot = table[place // 4] * 4 + place % 4
            assert slot not in slots and table[place // 4] < plan.num_blocks[0]
            slots[slot] = start + place - context
        start += count
    for owner, table in zip(batch.owners, plan.block_tables[0]):
        assert [slots[table[place // 4] * 4 + place % 4] for place in range(len(table) * 4)[: len(sequences[owner])]] == (
            batch.rows[owner]
        )
    beginnings = {tuple(tokens[:end]) for tokens in sequences for end in range(4, len(tokens) + 1, 4)}
    rests = sum(len(tokens) % 4 for tokens in sequences)
    assert batch.num_tokens == (sum(map(len, sequences)) if stateful else 4 * len(beginnings) + rests)
    assert plan.states == ([(-1, slot) for slot in range(len(sequences))] if stateful else [])
