"""Pools and schedulers whose number of blocks changes while sequences hold some: every block's content stays where it is told."""

from __future__ import annotations

from random import Random

import pytest

from hf_paged.base.errors import CacheFull
from hf_paged.core.blocks import BlockPool
from hf_paged.core.request import Request
from hf_paged.core.scheduler import GroupSpec, Scheduler

BLOCK = 4


def test_blocks_beyond_move_to_free_places_below():
    pool = BlockPool(8, 8)
    blocks = [pool.allocate() for _ in range(8)]
    pool.incref(6)
    pool.publish(6, b"six")
    for block in (1, 3, 5, 7):
        pool.release(block)
    moves = pool.resize(5)
    assert moves == {6: 1} or moves == {6: 3}
    pool.check_integrity({0: 1, 2: 1, 4: 1, moves[6]: 2})
    assert pool.lookup(b"six") == moves[6] and pool.num_blocks == 5 and blocks == list(range(8))


def test_cached_blocks_are_forgotten_only_where_they_must_be():
    pool = BlockPool(6, 6)
    for index in range(6):
        pool.publish(pool.allocate(), bytes([index]))
    for block in range(5):
        pool.release(block)
    assert pool.resize(3) == {5: 0}  # the least recently used of those below gives way
    pool.check_integrity({0: 1})
    assert [pool.lookup(bytes([index])) for index in range(6)] == [None, 1, 2, None, None, 0]
    assert pool.resize(10) == {}
    pool.check_integrity({0: 1})
    taken = [pool.allocate() for _ in range(9)]
    assert sorted(taken) == [1, 2, *range(3, 10)] and pool.num_blocks == 10


class Contents:
    """What is in every block of every group, as the device would have it: the tokens written there."""

    def __init__(self, num_groups: int):
        self.blocks: list[dict[int, dict[int, int]]] = [{} for _ in range(num_groups)]

    def move(self, moves) -> None:
        for blocks, moved in zip(self.blocks, moves):
            assert not moved.keys() & set(moved.values())
            for old, new in moved.items():
                blocks[new] = dict(blocks.pop(old))

    def run(self, plan, scheduler) -> None:
        for blocks, copies in zip(self.blocks, plan.copies):
            for source, target in copies:
                blocks[target] = dict(blocks[source])
        start = 0
        for index, (seq_id, new, context) in enumerate(zip(plan.seq_ids, plan.num_new, plan.num_context)):
            for group, blocks in enumerate(self.blocks):
                table = plan.block_tables[group][index]
                for position in range(context, context + new):
                    block = blocks.setdefault(table[position // BLOCK], {})
                    block[position % BLOCK] = plan.token_ids[start + position - context]
            start += new
        for index, (seq_id, new, context) in enumerate(zip(plan.seq_ids, plan.num_new, plan.num_context)):
            tokens = scheduler.sequence(seq_id).token_ids
            for group, blocks in enumerate(self.blocks):
                span = scheduler._tables.groups[group].span or 10**9
                table = plan.block_tables[group][index]
                for position in range(max(0, context + new - span), context + new):
                    assert blocks[table[position // BLOCK]][position % BLOCK] == tokens[position], "wrong contents"


@pytest.mark.parametrize("seed", range(12))
def test_random_sizes_under_random_requests(seed):
    rng = Random(seed)
    groups = [GroupSpec(), GroupSpec(window=6)][: 1 + seed % 2]
    scheduler = Scheduler(
        groups=groups, block_size=BLOCK, num_blocks=[8] * len(groups), max_blocks=[40] * len(groups),
        max_batch_tokens=16, max_num_seqs=5, max_model_len=40, prefix_cache=seed % 3 > 0,
    )  # fmt: skip
    contents, finished, expected = Contents(len(groups)), 0, 0
    for step in range(250):
        if rng.random() < 0.2 and expected < 40:
            prompt = [rng.randint(0, 3) for _ in range(rng.randint(1, 12))]
            request = Request(request_id=str(step), prompt_token_ids=prompt, max_tokens=rng.randint(1, 12), n=rng.randint(1, 2))
            scheduler.add(request)
            expected += request.n
        if rng.random() < 0.3:
            most = [rng.randint(14, 40) for _ in groups]  # two completions of 24 tokens always fit
            assert not scheduler.oversized(most)
            contents.move(scheduler.resize(most))
            scheduler.check_integrity()
            assert all(pool.num_blocks <= count for pool, count in zip(scheduler._tables.pools, most))
        if rng.random() < 0.03:
            scheduler.empty([rng.randint(1, 14) for _ in groups])
            contents = Contents(len(groups))
            scheduler.check_integrity()
            assert scheduler.num_running == 0
        plan = scheduler.schedule()
        if plan is None:
            continue
        contents.run(plan, scheduler)
        done = scheduler.commit(plan, {seq_id: [rng.randint(0, 3)] for _, seq_id in plan.samples})
        finished += sum(seq.finish_reason is not None for seq in done)
        scheduler.check_integrity()
    while (plan := scheduler.schedule()) is not None:
        contents.run(plan, scheduler)
        done = scheduler.commit(plan, {seq_id: [1] for _, seq_id in plan.samples})
        finished += sum(seq.finish_reason is not None for seq in done)
    assert finished == expected > 10


def test_what_is_oversized_is_named():
    scheduler = Scheduler(groups=[GroupSpec()], block_size=BLOCK, num_blocks=[8], max_blocks=[40], max_batch_tokens=16,
                          max_num_seqs=5, max_model_len=100)  # fmt: skip
    long = Request(request_id="long", prompt_token_ids=[1] * 20, max_tokens=21)
    short = Request(request_id="short", prompt_token_ids=[1] * 4, max_tokens=4)
    scheduler.add(long)
    scheduler.add(short)
    assert [request for request, _ in scheduler.oversized([9])] == [long]
    assert "can take 10 KV blocks" in scheduler.oversized([9])[0][1]
    assert not scheduler.oversized([10])


def test_held_sequences_are_not_thrown_out():
    scheduler = Scheduler(groups=[GroupSpec()], block_size=BLOCK, num_blocks=[8], max_blocks=[40], max_batch_tokens=64,
                          max_num_seqs=5, max_model_len=100)  # fmt: skip
    kept, spare = scheduler.held.new("kept"), scheduler.held.new("spare", expendable=True)
    for sequence in (kept, spare):
        plan, _ = scheduler.held.plan([(sequence, [1] * 20)], release_unseen=False)
        scheduler.held.commit(plan)
    with pytest.raises(CacheFull, match="hold 5 KV blocks"):
        scheduler.resize([4])
    assert spare.num_computed == 20
    scheduler.resize([6])
    assert (kept.num_computed, spare.num_computed) == (20, 0)
    with pytest.raises(CacheFull, match="cannot be computed again"):
        scheduler.empty([1])
    assert kept.num_computed == 20
    scheduler.held.release(kept)
    scheduler.empty([1])
    scheduler.check_integrity()
