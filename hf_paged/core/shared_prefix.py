"""Which sequences of a step begin with the same blocks, so that attention can read those once for all of them.

Sequences that took the same blocks from the prefix cache, or were forked, have equal leading entries in their block
tables. Attention over such a prefix can be computed for all of them together and merged with that over the rest of
each (Hydragen, arXiv 2402.05099; cascade inference in FlashInfer, arXiv 2501.01005).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Sequences whose first `num_blocks` blocks are the same.

    Attributes:
        members: their places in the tables given, two or more.
    """

    num_blocks: int
    members: tuple[int, ...]

    def saved_blocks(self, per_pass: int) -> int:
        """Blocks that need not be read, if one reading of the prefix serves `per_pass` sequences."""
        return (len(self.members) - -(-len(self.members) // per_pass)) * self.num_blocks


def find_shared_prefixes(
    tables: Sequence[list[int]], full_blocks: Sequence[int], per_pass: int, unit: int = 1
) -> list[SharedPrefix]:
    """Disjoint groups of sequences that save much reading, by the blocks they share.

    Args:
        tables: block tables.
        full_blocks: how many leading blocks of each are full and not written any more; only those are shared.
        per_pass: how many sequences one reading of a prefix serves.
        unit: blocks are shared only so many at a time.

    Sorting brings equal beginnings together, after which groups are runs; n sequences cost n log n comparisons of their
    common blocks. A prefix may go on differently in parts of a run (a system prompt, then one of several examples): a
    part is a group of its own where that saves more than its membership in the whole.
    """
    shared = [(table[:count], place) for place, (table, count) in enumerate(zip(tables, full_blocks)) if count]
    shared.sort()
    common = [_common_blocks(a, b) // unit * unit for (a, _), (b, _) in zip(shared, shared[1:])]
    places = [place for _, place in shared]
    groups: list[SharedPrefix] = []
    for begin, end in _runs(common, 0, len(places), 0):
        groups += _best_groups(places, common, begin, end, per_pass)
    return groups


def _best_groups(places: list[int], common: list[int], begin: int, end: int, per_pass: int) -> list[SharedPrefix]:
    """Groups of places[begin:end], whose neighbours share common[begin:end - 1] blocks, none of them 0."""
    if end - begin < 2:
        return []
    depth = min(common[begin : end - 1])
    whole = [SharedPrefix(depth, tuple(places[begin:end]))]
    apart: list[SharedPrefix] = []
    rest: list[tuple[list[int], list[SharedPrefix]]] = []
    for first, last in _runs(common, begin, end, depth):
        own = _best_groups(places, common, first, last, per_pass)
        if _saved(own, per_pass) > depth * (last - first):
            apart += own
        else:
            rest.append((places[first:last], own))
    if len(rest) == 1:
        apart += rest[0][1]
    elif rest:
        apart.append(SharedPrefix(depth, tuple(place for members, _ in rest for place in members)))
    best = max(whole, apart, key=lambda groups: _saved(groups, per_pass))
    return best if _saved(best, per_pass) else []


def _runs(common: list[int], begin: int, end: int, depth: int) -> Iterator[tuple[int, int]]:
    """[begin, end) cut wherever neighbours share no more than `depth` blocks."""
    first = begin
    for last in range(begin + 1, end + 1):
        if last == end or common[last - 1] <= depth:
            yield first, last
            first = last


def _saved(groups: list[SharedPrefix], per_pass: int) -> int:
    return sum(group.saved_blocks(per_pass) for group in groups)


def _common_blocks(a: list[int], b: list[int]) -> int:
    """How many first entries of a and b are equal, by bisection: slices are compared at C's speed."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
