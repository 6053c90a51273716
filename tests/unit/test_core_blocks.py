"""BlockPool: reference counts, which block is handed out next, what stays findable, and the integrity check."""

import pytest

from hf_paged.core.blocks import BlockPool


def cached_pool(keys, max_blocks) -> BlockPool:
    """A pool in which the blocks of `keys` are free and findable; the first of them was released first."""
    pool = BlockPool(len(keys), max_blocks)
    blocks = [pool.allocate() for _ in keys]
    for block, key in zip(blocks, keys):
        pool.publish(block, key)
    for block in blocks:
        pool.release(block)
    return pool


# -- reference counts


def test_a_block_is_free_only_after_its_last_holder_released_it():
    pool = BlockPool(2, 2)
    block = pool.allocate()
    pool.incref(block)
    pool.release(block)
    assert (pool.refs[block], pool.num_in_use, pool.num_free) == (1, 1, 1)
    pool.release(block)
    assert (pool.refs[block], pool.num_in_use, pool.num_free) == (0, 0, 2)
    pool.check_integrity({})


def test_releasing_a_free_block_is_refused():
    pool = BlockPool(1, 1)
    block = pool.allocate()
    pool.release(block)
    with pytest.raises(AssertionError, match="released too often"):
        pool.release(block)


def test_allocated_blocks_are_distinct_and_an_exhausted_pool_refuses():
    pool = BlockPool(1, 5)
    assert {pool.allocate() for _ in range(5)} == set(range(5))
    assert pool.num_free == 0
    with pytest.raises(AssertionError, match="exhausted"):
        pool.allocate()


def test_peak_is_the_most_blocks_in_use_since_the_last_reset():
    pool = BlockPool(4, 4)
    blocks = [pool.allocate() for _ in range(3)]
    for block in blocks[1:]:
        pool.release(block)
    assert (pool.num_in_use, pool.peak_in_use) == (1, 3)
    pool.reset_peak()
    assert pool.peak_in_use == 1
    pool.allocate()
    assert pool.peak_in_use == 2


def test_reviving_a_cached_block_counts_it_as_used_again():
    pool = cached_pool([b"a"], 2)
    block = pool.lookup(b"a")
    pool.incref(block)
    assert (pool.refs[block], pool.num_in_use, pool.num_free) == (1, 1, 1)
    assert pool.allocate() != block
    assert pool.lookup(b"a") == block
    pool.check_integrity({0: 1, 1: 1})


# -- which block comes next


def test_blank_blocks_are_used_before_the_pool_grows():
    pool = BlockPool(2, 8)
    pool.allocate(), pool.allocate()
    assert pool.num_blocks == 2
    pool.allocate()
    assert 2 < pool.num_blocks <= 8


def test_the_pool_grows_before_it_evicts():
    pool = cached_pool([b"a"], 3)
    pool.allocate(), pool.allocate()
    assert pool.num_blocks == 3
    assert pool.lookup(b"a") is not None
    pool.allocate()
    assert pool.lookup(b"a") is None
    assert (pool.num_blocks, pool.num_published) == (3, 0)


def test_growth_stops_at_max_blocks_and_is_by_half_when_large():
    pool = BlockPool(100, 1000)
    for _ in range(101):
        pool.allocate()
    assert pool.num_blocks == 150
    small = BlockPool(0, 5)
    small.allocate()
    assert small.num_blocks == 5


def test_eviction_takes_the_least_recently_released_first():
    pool = cached_pool([b"a", b"b", b"c"], 3)
    gone = []
    for _ in range(3):
        pool.allocate()
        gone.append([key for key in (b"a", b"b", b"c") if pool.lookup(key) is None])
    assert gone == [[b"a"], [b"a", b"b"], [b"a", b"b", b"c"]]


def test_using_a_cached_block_again_makes_it_the_last_to_be_evicted():
    pool = cached_pool([b"a", b"b", b"c"], 3)
    block = pool.lookup(b"a")
    pool.incref(block)
    pool.release(block)
    pool.allocate()
    assert pool.lookup(b"b") is None
    assert pool.lookup(b"a") == block and pool.lookup(b"c") is not None


def test_blocks_in_use_are_never_evicted():
    pool = cached_pool([b"a", b"b"], 2)
    held = pool.lookup(b"a")
    pool.incref(held)
    assert pool.allocate() != held
    assert pool.lookup(b"a") == held and pool.lookup(b"b") is None


# -- keys


def test_a_second_block_with_the_same_key_is_not_published():
    pool = BlockPool(2, 2)
    first, second = pool.allocate(), pool.allocate()
    assert pool.publish(first, b"a") is True
    assert pool.publish(second, b"a") is False
    assert pool.lookup(b"a") == first and pool.key_of(second) is None
    pool.check_integrity({first: 1, second: 1})


def test_a_free_block_cannot_be_published():
    with pytest.raises(AssertionError, match="published while free"):
        BlockPool(1, 1).publish(0, b"a")


@pytest.mark.parametrize("in_use", [True, False])
def test_an_unpublished_block_is_not_found_and_can_be_used_again(in_use):
    pool = cached_pool([b"a"], 1)
    block = pool.lookup(b"a")
    if in_use:
        pool.incref(block)
    pool.unpublish(block)
    assert pool.lookup(b"a") is None
    pool.check_integrity({block: 1} if in_use else {})
    if in_use:
        pool.release(block)
    assert pool.allocate() == block
    pool.unpublish(block)  # it has no key: nothing happens
    pool.check_integrity({block: 1})


def test_clearing_the_cache_forgets_keys_and_keeps_blocks_in_use():
    pool = cached_pool([b"a", b"b", b"c"], 3)
    held = pool.lookup(b"b")
    pool.incref(held)
    pool.clear_cache()
    assert [pool.lookup(key) for key in (b"a", b"b", b"c")] == [None, None, None]
    assert (pool.num_published, pool.num_in_use, pool.num_free) == (0, 1, 2)
    pool.check_integrity({held: 1})
    assert held not in (pool.allocate(), pool.allocate())


# -- the integrity check


def busy_pool() -> tuple[BlockPool, dict[int, int]]:
    """One shared block with a key, one free with a key, one blank."""
    pool = BlockPool(3, 4)
    shared, cached = pool.allocate(), pool.allocate()
    pool.publish(shared, b"shared")
    pool.publish(cached, b"cached")
    pool.incref(shared)
    pool.release(cached)
    return pool, {shared: 2}


def test_integrity_holds_for_a_sound_pool():
    pool, expected = busy_pool()
    pool.check_integrity(expected)


def test_integrity_catches_a_leaked_and_a_lost_reference():
    pool, expected = busy_pool()
    with pytest.raises(AssertionError, match="block 0 has 2 references, 1 expected"):
        pool.check_integrity({0: 1})
    with pytest.raises(AssertionError, match="block 0 has 2 references, 3 expected"):
        pool.check_integrity({0: 3})
    with pytest.raises(AssertionError, match="does not exist"):
        pool.check_integrity({**expected, 7: 1})


@pytest.mark.parametrize("block", [0, 1, 2])
def test_integrity_catches_a_corrupted_count_of_any_block(block):
    pool, expected = busy_pool()
    pool.refs[block] += 1
    with pytest.raises(AssertionError, match=f"block {block} has"):
        pool.check_integrity(expected)


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda pool: pool._blank.append(2),  # twice in the free list
        lambda pool: pool._blank.append(1),  # blank and cached
        lambda pool: pool._blank.append(0),  # in use and blank
        lambda pool: pool._blank.clear(),  # lost
        lambda pool: pool._cached.clear(),
        lambda pool: setattr(pool, "num_in_use", 2),
        lambda pool: setattr(pool, "peak_in_use", 0),
        lambda pool: pool._block_of.pop(b"shared"),
        lambda pool: pool._key_of.pop(1),
    ],
)
def test_integrity_catches_corrupted_lists_and_indices(corrupt):
    pool, expected = busy_pool()
    corrupt(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity(expected)
