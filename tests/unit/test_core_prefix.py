"""The prefix cache: its keys, the search for the longest hit, and what a scheduler shares because of it."""

import zlib
from array import array

import pytest

from hf_paged.core.blocks import BlockPool
from hf_paged.core.prefix import extend_keys, longest_hit, root_key
from hf_paged.core.request import Request
from hf_paged.core.scheduler import GroupSpec, Scheduler


def make(windows=(None,), block_size=4, max_blocks=64, **limits) -> Scheduler:
    counts = list(max_blocks) if isinstance(max_blocks, tuple) else [max_blocks] * len(windows)
    defaults = dict(max_batch_tokens=64, max_num_seqs=8, max_model_len=256)
    return Scheduler(
        groups=[kind if isinstance(kind, GroupSpec) else GroupSpec(kind) for kind in windows],
        block_size=block_size,
        num_blocks=[1] * len(counts),
        max_blocks=counts,
        **{**defaults, **limits},
    )


def add(scheduler, name, prompt, max_tokens=4, **options) -> Request:
    request = Request(request_id=name, prompt_token_ids=list(prompt), max_tokens=max_tokens, **options)
    scheduler.add(request)
    return request


def commit(scheduler, plan) -> None:
    sequences = [scheduler.sequence(seq_id) for _, seq_id in plan.samples]
    scheduler.commit(plan, {s.seq_id: [zlib.crc32(repr((s.token_ids, s.index)).encode())] for s in sequences})
    scheduler.check_integrity()


def rows(scheduler, plan) -> dict[str, tuple[int, int]]:
    """request id -> (tokens from the cache, tokens computed) in this step."""
    names = [scheduler.sequence(seq_id).request.request_id for seq_id in plan.seq_ids]
    return dict(zip(names, zip(plan.num_context, plan.num_new)))


def step(scheduler) -> dict[str, tuple[int, int]]:
    plan = scheduler.schedule()
    scheduler.check_integrity()
    result = rows(scheduler, plan)
    commit(scheduler, plan)
    return result


def drain(scheduler) -> None:
    for _ in range(500):
        if not scheduler.has_unfinished():
            assert not any(scheduler.stats()["blocks_in_use"])
            return
        step(scheduler)
    raise AssertionError("it does not come to an end")


def keys_of(tokens, block_size=2, salt=None) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, list(tokens), len(tokens) // block_size, block_size, salt)
    return keys


# -- keys


def test_equal_histories_have_equal_keys_however_they_are_extended():
    tokens = list(range(12))
    keys: list[bytes] = []
    for count in (1, 1, 4, 2, 6):
        extend_keys(keys, tokens, count, 2, "salt")
    assert keys == keys_of(tokens, salt="salt")
    assert len(set(keys)) == 6


def test_a_key_names_the_whole_history_not_only_its_block():
    first, second = keys_of([1, 2, 8, 9]), keys_of([1, 3, 8, 9])
    assert first[0] != second[0] and first[1] != second[1]
    assert keys_of([1, 2, 1, 2])[0] != keys_of([1, 2, 1, 2])[1]
    assert keys_of([2, 1])[0] != keys_of([1, 2])[0]


def test_kinds_of_salt_and_salts_separate_all_keys():
    salts = [None, "", b"", "a", b"a", "b", "None", b"\0", "\0", "\ud800"]
    assert len({root_key(salt) for salt in salts}) == len(salts)
    chains = [keys_of(range(4), salt=salt) for salt in salts]
    for depth in range(2):
        assert len({chain[depth] for chain in chains}) == len(salts)
    assert root_key("a") == root_key("a")


def test_tokens_cut_at_other_places_do_not_forge_a_key():
    assert keys_of([1, 23])[0] != keys_of([12, 3])[0]
    assert keys_of([0x0102, 0x03])[0] != keys_of([0x01, 0x0203])[0]
    assert keys_of([1, 0])[0] != keys_of([1], block_size=1)[0]
    assert keys_of([1 + (2 << 32)], block_size=1)[0] != keys_of([1, 2])[0]
    assert keys_of([1 << 16])[:1] != keys_of([0, 1])[:1]
    assert keys_of(range(4), block_size=4)[0] != keys_of(range(4), block_size=2)[1]


def test_a_salt_made_of_another_chains_bytes_does_not_forge_its_key():
    victim = keys_of([5, 6, 7, 8])
    for parent, block in ((root_key(None), [5, 6]), (victim[0], [7, 8])):
        forged = parent + array("q", block).tobytes()
        assert root_key(forged) not in victim
        assert not set(keys_of([7, 8], salt=forged)) & set(victim)
        assert not set(keys_of([7, 8], salt=parent)) & set(victim)


# -- longest hit


FULL, WINDOW = GroupSpec(), GroupSpec(4)


def published(keys, which, num_blocks=16) -> BlockPool:
    pool = BlockPool(num_blocks, num_blocks)
    for index in which:
        pool.publish(pool.allocate(), keys[index])
    return pool


@pytest.mark.parametrize(
    "num_context, window, expected",
    [(100, None, 0), (4, 5, 0), (5, 5, 0), (7, 5, 0), (8, 5, 1), (11, 5, 1), (12, 5, 2), (4, 1, 1), (0, 1, 0)],
)
def test_blocks_that_no_further_query_sees(num_context, window, expected):
    assert GroupSpec(window).num_unseen_blocks(num_context, 4) == expected


@pytest.mark.parametrize("num_context, expected", [(0, 0), (9, 0), (10, 2), (11, 2), (19, 2), (20, 5), (25, 5)])
def test_blocks_of_earlier_chunks_are_seen_no_more(num_context, expected):
    assert GroupSpec(chunk=10).num_unseen_blocks(num_context, 4) == expected


def test_with_blocks_of_one_token_a_window_leaves_one_behind_at_once():
    assert [GroupSpec(3).num_unseen_blocks(num_context, 1) for num_context in range(6)] == [0, 0, 0, 1, 2, 3]


def test_full_attention_needs_every_block_from_the_start():
    keys = keys_of(range(10))
    assert longest_hit([published(keys, [0, 1, 2, 4])], [FULL], keys, 5, 2) == 3
    assert longest_hit([published(keys, [1, 2])], [FULL], keys, 5, 2) == 0
    assert longest_hit([published(keys, range(5))], [FULL], keys, 4, 2) == 4


def test_a_sliding_group_needs_only_the_blocks_its_next_query_sees():
    keys = keys_of(range(12))
    # after 10 tokens a window of 4 sees positions 7, 8, 9: blocks 3 and 4
    assert longest_hit([published(keys, [3, 4])], [WINDOW], keys, 5, 2) == 5
    assert longest_hit([published(keys, [4])], [WINDOW], keys, 5, 2) == 0
    assert longest_hit([published(keys, [0, 1, 2, 4])], [WINDOW], keys, 5, 2) == 3


def test_a_chunked_group_needs_only_the_blocks_of_the_chunk_that_goes_on():
    keys, chunks = keys_of(range(12)), [GroupSpec(chunk=6)]
    assert longest_hit([published(keys, [])], chunks, keys, 5, 2) == 3  # the chunk of position 6 has no token yet
    assert longest_hit([published(keys, [3, 4])], chunks, keys, 5, 2) == 5
    assert longest_hit([published(keys, [4])], chunks, keys, 5, 2) == 3
    assert longest_hit([published(keys, [0])], chunks, keys, 2, 2) == 1
    uneven = [GroupSpec(chunk=5)]  # its chunk begins inside block 2
    assert longest_hit([published(keys, [2])], uneven, keys, 3, 2) == 3
    assert longest_hit([published(keys, [])], uneven, keys, 3, 2) == 0


def test_a_hit_must_be_usable_in_all_groups():
    keys = keys_of(range(12))
    full, sliding = published(keys, range(4)), published(keys, [0, 1, 3, 4])
    assert longest_hit([full, published(keys, [2, 3])], [FULL, WINDOW], keys, 5, 2) == 4
    assert longest_hit([full, sliding], [FULL, WINDOW], keys, 5, 2) == 2  # after 3 or 4 blocks it would still see block 2
    assert longest_hit([sliding, full], [WINDOW, FULL], keys, 5, 2) == 2


# -- sharing


def test_a_later_request_takes_the_prefix_from_the_cache():
    scheduler = make()
    add(scheduler, "first", range(10))
    drain(scheduler)
    request = add(scheduler, "second", [*range(9), 77, 78])
    assert step(scheduler) == {"second": (8, 3)}
    assert request.sequences[0].num_cached_tokens == 8
    assert scheduler.stats()["prefix_hit_tokens"] == 8
    assert scheduler.stats()["prefix_queried_tokens"] == 10 + 11


def test_generated_tokens_are_cached_too():
    scheduler = make()
    first = add(scheduler, "first", range(6), max_tokens=7)
    drain(scheduler)
    add(scheduler, "next turn", [*first.sequences[0].token_ids, 50])
    assert step(scheduler) == {"next turn": (12, 2)}  # 6 + 7 tokens, of which the last was never fed back


def test_a_request_gets_the_blocks_of_a_running_one():
    scheduler = make()
    add(scheduler, "first", range(8), max_tokens=9)
    step(scheduler)
    add(scheduler, "second", range(10))
    plan = scheduler.schedule()
    assert rows(scheduler, plan) == {"first": (8, 1), "second": (8, 2)}
    first, second = plan.block_tables[0]
    assert first[:2] == second[:2] and first[2] != second[2]


@pytest.mark.parametrize("length, hit", [(8, 4), (9, 8), (4, 0), (5, 4)])
def test_at_least_one_token_is_left_to_compute(length, hit):
    scheduler = make()
    add(scheduler, "first", range(16))
    drain(scheduler)
    add(scheduler, "second", range(length))
    assert step(scheduler) == {"second": (hit, length - hit)}


def test_32_requests_with_one_prefix_compute_it_once_in_one_step():
    scheduler = make(max_num_seqs=32, max_blocks=128, max_batch_tokens=256)
    prefix = list(range(100, 116))
    requests = [add(scheduler, f"r{i}", [*prefix, i], max_tokens=2) for i in range(32)]
    plan = scheduler.schedule()
    assert sorted(plan.num_new) == [1] * 31 + [17]
    assert plan.num_tokens == 16 + 32
    assert len({tuple(table[:4]) for table in plan.block_tables[0]}) == 1
    assert len({table[4] for table in plan.block_tables[0]}) == 32
    assert scheduler.stats()["blocks_in_use"] == [4 + 32]
    commit(scheduler, plan)
    assert [request.sequences[0].num_cached_tokens for request in requests] == [0] + [16] * 31
    assert scheduler.stats()["prefix_hit_tokens"] == 31 * 16
    drain(scheduler)


def test_different_salts_share_nothing():
    scheduler = make()
    for name, salt in (("a", None), ("b", ""), ("c", "x"), ("d", b"x"), ("e", "x")):
        add(scheduler, name, range(9), cache_salt=salt)
    assert step(scheduler) == {"a": (0, 9), "b": (0, 9), "c": (0, 9), "d": (0, 9), "e": (8, 1)}


def test_a_request_that_does_not_read_the_cache_still_fills_it():
    scheduler = make()
    add(scheduler, "first", range(9))
    drain(scheduler)
    scheduler.reset_prefix_cache()
    scheduler.reset_stats()
    add(scheduler, "anew", range(9), max_cached_tokens=0)
    assert step(scheduler) == {"anew": (0, 9)}
    assert scheduler.stats()["prefix_queried_tokens"] == 0
    add(scheduler, "anew too", range(9), max_cached_tokens=0)
    add(scheduler, "reader", range(9))
    assert step(scheduler) == {"anew": (9, 1), "anew too": (0, 9), "reader": (8, 1)}
    drain(scheduler)


def test_a_request_takes_no_more_from_the_cache_than_it_may():
    scheduler = make()
    add(scheduler, "first", range(17))
    drain(scheduler)
    for name, most, expected in (("a", 16, 16), ("b", 15, 12), ("c", 3, 0)):
        add(scheduler, name, range(17), max_cached_tokens=most, max_tokens=1)
        assert step(scheduler) == {name: (expected, 17 - expected)}


def test_what_waits_for_a_prefill_of_the_same_step_takes_no_more_than_it_may():
    scheduler = make(max_batch_tokens=8)
    add(scheduler, "leader", range(17), max_tokens=0)
    for name, most in (("waits", 16), ("does not", 4)):
        add(scheduler, name, range(17), max_cached_tokens=most, max_tokens=0)
    assert step(scheduler) == {"leader": (0, 8)}
    assert step(scheduler) == {"leader": (8, 8)}
    assert step(scheduler) == {"leader": (16, 1), "waits": (16, 1), "does not": (4, 6)}
    drain(scheduler)


def test_without_a_prefix_cache_nothing_is_shared():
    scheduler = make(prefix_cache=False)
    add(scheduler, "first", range(9))
    add(scheduler, "second", range(9))
    assert step(scheduler) == {"first": (0, 9), "second": (0, 9)}
    drain(scheduler)
    add(scheduler, "third", range(9))
    assert step(scheduler) == {"third": (0, 9)}
    assert scheduler.stats()["prefix_queried_tokens"] == 0


def test_the_tail_of_a_prefix_is_evicted_before_its_head():
    scheduler = make(block_size=2, max_blocks=4)
    add(scheduler, "old", range(6), max_tokens=1)
    drain(scheduler)
    add(scheduler, "other", [90, 91, 92], max_tokens=1)  # one blank block, one evicted
    drain(scheduler)
    add(scheduler, "again", range(7), max_tokens=1)
    assert step(scheduler) == {"again": (4, 3)}


def test_an_evicted_prefix_is_computed_again():
    scheduler = make(block_size=2, max_blocks=4)
    add(scheduler, "old", range(6), max_tokens=1)
    drain(scheduler)
    add(scheduler, "other", range(90, 98), max_tokens=1)
    drain(scheduler)
    add(scheduler, "again", range(7), max_tokens=1)
    assert step(scheduler) == {"again": (0, 7)}


# -- a prefix that is being computed


def test_a_prefix_computed_in_chunks_is_computed_once():
    scheduler = make(max_batch_tokens=16)
    add(scheduler, "leader", [*range(40), 70])
    add(scheduler, "follower", [*range(40), 71])
    steps = [step(scheduler) for _ in range(3)]
    assert steps == [{"leader": (0, 16)}, {"leader": (16, 16)}, {"leader": (32, 9), "follower": (40, 1)}]


def held_back() -> Scheduler:
    """Blocks are short: "leader" gets one token of its chunk only, "follower" (same prompt) could push "victim" out.

    Budget is left in this step, so nothing but patience keeps "follower" from computing what "leader" is about to.
    """
    scheduler = make(block_size=1, max_blocks=15, max_batch_tokens=3, policy="priority")
    add(scheduler, "victim", [90, 91], max_tokens=12, priority=1)
    while scheduler.sequence(0).num_computed < 5:
        step(scheduler)
    add(scheduler, "leader", range(9), max_tokens=1)
    for done in (0, 2, 4):
        assert step(scheduler)["leader"] == (done, 2)
    add(scheduler, "follower", range(9), max_tokens=1)
    return scheduler


def test_a_request_is_held_back_while_its_prefix_is_being_computed():
    scheduler = held_back()
    assert step(scheduler) == {"leader": (6, 1)}
    assert (scheduler.stats()["waiting"], scheduler.stats()["preemptions"]) == (1, 0)
    assert step(scheduler) == {"leader": (7, 2), "follower": (8, 1)}
    drain(scheduler)


@pytest.mark.parametrize("in_flight", [False, True])
def test_a_request_held_back_goes_on_by_itself_if_its_leader_is_aborted(in_flight):
    scheduler = held_back()
    plan = scheduler.schedule()
    assert rows(scheduler, plan) == {"leader": (6, 1)}
    if in_flight:
        scheduler.abort("leader")
    commit(scheduler, plan)
    if not in_flight:
        scheduler.abort("leader")
    assert step(scheduler)["follower"] == (7, 2)
    drain(scheduler)


def test_a_follower_goes_on_from_what_an_aborted_leader_computed():
    scheduler = make(max_batch_tokens=16)
    add(scheduler, "leader", [*range(40), 70])
    add(scheduler, "follower", [*range(40), 71])
    step(scheduler)
    scheduler.abort("leader")
    assert step(scheduler) == {"follower": (16, 16)}
    drain(scheduler)


# -- sliding groups


def test_a_sliding_group_gives_back_what_its_window_left_behind():
    scheduler = make(windows=(None, 4), block_size=2, prefix_cache=False)
    add(scheduler, "r", range(8), max_tokens=5)
    plan = scheduler.schedule()
    assert all(-1 not in table for tables in plan.block_tables for table in tables)
    assert scheduler.stats()["blocks_in_use"] == [4, 4]
    commit(scheduler, plan)
    seen = []
    while (plan := scheduler.schedule()) is not None:
        full, sliding = plan.block_tables[0][0], plan.block_tables[1][0]
        assert -1 not in full and len(full) == len(sliding)
        assert -1 not in sliding[sliding.count(-1) :]
        seen.append((plan.num_context[0], sliding.count(-1), scheduler.stats()["blocks_in_use"]))
        commit(scheduler, plan)
    assert seen == [(8, 2, [5, 3]), (9, 3, [5, 2]), (10, 3, [6, 3]), (11, 4, [6, 2])]


def test_a_chunked_group_gives_back_every_block_before_its_chunk():
    scheduler = make(windows=(None, GroupSpec(chunk=6)), block_size=2, prefix_cache=False)
    add(scheduler, "r", range(8), max_tokens=7)
    commit(scheduler, scheduler.schedule())
    seen = []
    while (plan := scheduler.schedule()) is not None:
        seen.append((plan.num_context[0], plan.block_tables[1][0].count(-1)))
        commit(scheduler, plan)
    assert seen == [(8, 3), (9, 3), (10, 3), (11, 3), (12, 6), (13, 6)]


def test_a_long_sequence_needs_few_blocks_of_a_sliding_group():
    scheduler = make(windows=(4,), block_size=2, max_blocks=5, max_batch_tokens=3)
    add(scheduler, "r", range(40), max_tokens=20)
    drain(scheduler)
    assert scheduler.stats()["blocks_peak"] <= [5]


def test_a_long_prompt_is_admitted_beside_others_into_a_small_sliding_group():
    scheduler = make(windows=(4,), block_size=2, max_blocks=10, max_batch_tokens=5)
    add(scheduler, "short", range(90, 93), max_tokens=20)
    step(scheduler)
    add(scheduler, "long", range(40), max_tokens=1)
    assert step(scheduler) == {"short": (3, 1), "long": (0, 4)}
    drain(scheduler)
    assert scheduler.stats()["preemptions"] == 0


def test_a_hit_in_a_sliding_group_takes_only_the_blocks_still_seen():
    scheduler = make(windows=(None, 4), block_size=2)
    add(scheduler, "first", range(12), max_tokens=1)
    drain(scheduler)
    add(scheduler, "second", range(12), max_tokens=1)
    plan = scheduler.schedule()
    assert rows(scheduler, plan) == {"second": (10, 2)}
    assert plan.block_tables[1][0][:3] == [-1] * 3 and -1 not in plan.block_tables[1][0][3:]
    assert -1 not in plan.block_tables[0][0]
    assert scheduler.stats()["blocks_in_use"] == [6, 3]
    commit(scheduler, plan)
    drain(scheduler)


def test_blocks_a_sliding_group_gave_back_can_still_be_hit():
    scheduler = make(windows=(None, 4), block_size=2)
    add(scheduler, "long", range(20), max_tokens=6)
    step(scheduler)
    step(scheduler)
    assert scheduler.sequence(0).block_tables[1][:8] == [-1] * 8
    add(scheduler, "short", range(7))
    assert step(scheduler)["short"] == (6, 1)
    drain(scheduler)


def test_no_hit_where_the_window_was_evicted():
    scheduler = make(windows=(None, 4), block_size=2, max_blocks=(64, 6))
    add(scheduler, "first", range(12), max_tokens=1)
    drain(scheduler)
    add(scheduler, "other", range(90, 98), max_tokens=1)  # takes 4 of the 6 sliding blocks, those of the tail
    drain(scheduler)
    add(scheduler, "second", range(12), max_tokens=1)
    assert step(scheduler) == {"second": (4, 8)}


# -- new weights


def test_after_a_reset_nothing_old_is_found():
    scheduler = make()
    add(scheduler, "first", range(9))
    drain(scheduler)
    scheduler.reset_prefix_cache()
    add(scheduler, "second", range(9))
    assert step(scheduler) == {"second": (0, 9)}
    add(scheduler, "third", range(9))
    assert step(scheduler)["third"] == (8, 1)


def test_sequences_running_at_a_reset_publish_no_more():
    scheduler = make(max_batch_tokens=16)
    running = add(scheduler, "running", range(24), max_tokens=6)
    step(scheduler)
    scheduler.reset_prefix_cache()
    assert step(scheduler) == {"running": (16, 8)}  # it keeps what it has
    add(scheduler, "head", range(17), max_tokens=1)
    while running.sequences[0].num_output < 5:
        step(scheduler)
    add(scheduler, "late", running.sequences[0].token_ids, max_tokens=1)
    assert ("late", (16, 13)) in step(scheduler).items()  # what "head" computed, nothing beyond
    drain(scheduler)


def test_forks_of_a_sequence_running_at_a_reset_publish_nothing():
    scheduler = make(max_batch_tokens=16)
    running = add(scheduler, "running", range(18), max_tokens=8, n=2)
    step(scheduler)
    scheduler.reset_prefix_cache()
    drain(scheduler)
    add(scheduler, "head", range(17), max_tokens=1)
    drain(scheduler)
    for sequence in running.sequences:
        add(scheduler, "late", sequence.token_ids, max_tokens=1)
        assert step(scheduler) == {"late": (16, 10)}
        scheduler.abort("late")


@pytest.mark.parametrize("in_flight", [False, True])
def test_recompute_all_makes_running_sequences_start_over_and_publish_again(in_flight):
    scheduler = make()
    running = add(scheduler, "running", range(8), max_tokens=6)
    step(scheduler)
    step(scheduler)
    output = list(running.sequences[0].output_ids)
    if in_flight:
        scheduler.schedule()
    scheduler.recompute_all()  # a plan under way is rolled back
    scheduler.check_integrity()
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 1)
    assert running.sequences[0].output_ids == output
    assert step(scheduler) == {"running": (0, 10)}
    assert running.sequences[0].num_preemptions == 0
    add(scheduler, "second", range(9))
    assert step(scheduler)["second"] == (8, 1)
    drain(scheduler)
