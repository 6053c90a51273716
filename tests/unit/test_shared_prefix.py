"""Groups of sequences that begin with the same blocks."""

from __future__ import annotations

from itertools import combinations
from random import Random

import pytest

from hf_paged.core.shared_prefix import SharedPrefix, find_shared_prefixes


def found(tables, full=None, per_pass=100):
    groups = find_shared_prefixes(tables, full or [len(table) for table in tables], per_pass)
    return {(group.num_blocks, group.members) for group in groups}


def test_equal_beginnings_are_found_wherever_they_stand():
    tables = [[7, 8, 1], [3, 4, 5], [7, 8, 2, 9], [6], [3, 4, 6], [7, 8]]
    assert found(tables) == {(2, (5, 0, 2)), (2, (1, 4))}


def test_nothing_is_shared_by_different_or_single_sequences():
    assert found([[1, 2], [2, 1], [3]]) == set()
    assert found([[1, 2, 3]]) == found([]) == set()


def test_blocks_that_are_still_written_are_not_shared():
    """Forks share the block they will both copy before they write it."""
    assert found([[1, 2, 3], [1, 2, 3]], full=[2, 2]) == {(2, (0, 1))}
    assert found([[1, 2], [1, 2], [1, 2]], full=[2, 0, 1]) == {(1, (2, 0))}
    assert found([[1], [1]], full=[0, 0]) == set()


def test_a_deeper_prefix_of_a_part_is_taken_where_it_saves_more():
    deep = [[1, *range(10, 30), i] for i in (50, 51, 52)]
    assert found([*deep, [1, 60]]) == {(21, (0, 1, 2))}
    wide = [[1, 2, 3, 4, 5, i] for i in range(50, 60)] + [[1, 2, 3, 4, 5, 6, 70], [1, 2, 3, 4, 5, 6, 71]]
    assert {(blocks, tuple(sorted(members))) for blocks, members in found(wide)} == {(5, tuple(range(12)))}


def test_two_parts_may_beat_the_whole():
    tables = [[1, 2, 3, 4, 0], [1, 2, 3, 4, 9], [1, 5, 6, 7, 0], [1, 5, 6, 7, 8]]
    assert found(tables) == {(4, (0, 1)), (4, (2, 3))}


def test_the_rest_keeps_the_whole_prefix():
    deep = [[1, 2, *range(10, 90), i] for i in (500, 501)]
    tables = [*deep, *([1, 2, i] for i in range(600, 606))]
    groups = {(blocks, tuple(sorted(members))) for blocks, members in found(tables)}
    assert groups == {(82, (0, 1)), (2, (2, 3, 4, 5, 6, 7))}


def test_one_reading_serves_so_many_sequences_only():
    tables = [[1, 2, i] for i in range(10, 15)]
    (group,) = find_shared_prefixes(tables, [3] * 5, per_pass=2)
    assert group.saved_blocks(2) == 2 * (5 - 3)
    assert find_shared_prefixes(tables, [3] * 5, per_pass=1) == []


@pytest.mark.parametrize("seed", range(60))
def test_groups_are_true_and_disjoint_and_no_single_one_is_better(seed):
    random = Random(seed)
    trunk = [random.randrange(3) for _ in range(4)]
    tables = []
    for _ in range(random.randrange(1, 9)):
        own = random.randrange(5)
        tables.append([*trunk[:own], *(random.randrange(3) for _ in range(random.randrange(1, 4)))])
    full = [random.randrange(len(table) + 1) for table in tables]
    groups = find_shared_prefixes(tables, full, 100)
    seen = [member for group in groups for member in group.members]
    assert len(seen) == len(set(seen))
    for group in groups:
        beginnings = {tuple(tables[i][: group.num_blocks]) for i in group.members}
        assert len(beginnings) == 1 and all(full[i] >= group.num_blocks for i in group.members)
    saved = sum(group.saved_blocks(100) for group in groups)
    for size in range(2, len(tables) + 1):
        for members in combinations(range(len(tables)), size):
            depth = 0
            while all(full[i] > depth for i in members) and len({tables[i][depth] for i in members}) == 1:
                depth += 1
            assert SharedPrefix(depth, members).saved_blocks(100) <= saved


def test_blocks_are_shared_so_many_at_a_time():
    tables = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [1, 8], [1, 9]]
    assert find_shared_prefixes(tables, [6, 6, 2, 2], 100, unit=2) == [SharedPrefix(4, (0, 1))]
    assert find_shared_prefixes(tables, [6, 6, 2, 2], 100, unit=8) == []
